"""Are two encoded images the same picture? Said from the pixels alone, without labels and without a tuned similarity.

What an encoder loses it loses in fine detail: block means stay nearly as they are, so the difference of two encodings
of one picture has hardly any energy at low frequencies. The difference of two pictures, however alike, has: in shape,
shading or exposure. Where one of the two is a JPEG there is a sharper test: compress the other one with the JPEG's own
quantisation tables, and see whether it comes nearer.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

BLOCK = 4  # pixels a side of the means that count as low frequencies
LOW_SHARE = 2 / BLOCK**2  # of the difference's energy: twice what noise without any structure has
ALPHA_DIFFERENCE = 1.0  # on average, of 255
LEFT_BY_JPEG = 0.5  # of the difference's energy, after the other picture was compressed like the JPEG


def same_picture(a: bytes, b: bytes, *, stands_out: bool) -> bool:
    """Whether two encoded images show one picture; of different sizes, the larger is resized to the smaller.

    `stands_out` says that the pair is far nearer than anything around it: then the frequencies of the difference are
    evidence enough. Else the pixels must be equal, or explained by a JPEG's compression.
    """
    if not _same_alpha(_open(a), _open(b)):
        return False
    x, y = _grey(a), _grey(b)
    if x.shape != y.shape:
        x, y = _one_size(x, y)
    energy = _energy(x - y)
    if energy == 0:
        return _same_colours(_open(a), _open(b))
    if stands_out and min(x.shape) >= BLOCK and low_share(x - y) < LOW_SHARE:
        return True
    return any(
        _energy(_grey(like) - _grey(as_jpeg)) < LEFT_BY_JPEG * energy
        for source, like in ((a, b), (b, a))
        if (as_jpeg := _compressed_like(source, like)) is not None
    )


def low_share(difference: np.ndarray) -> float:
    """Share of the energy of a difference (H, W) that the means of its BLOCK x BLOCK blocks hold: 0 to 1."""
    height, width = (side // BLOCK * BLOCK for side in difference.shape)
    whole = difference[:height, :width]
    means = whole.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean(axis=(1, 3))
    return BLOCK**2 * _energy(means) / max(_energy(whole), 1e-12)


def _energy(x: np.ndarray) -> float:
    return float(np.square(x).sum())


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _grey(data: bytes) -> np.ndarray:
    """Its luma; on black, where there is transparency, since colours that nobody sees differ by encoder."""
    image = _open(data)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    return np.asarray(image.convert("L"), np.float32)


def _same_alpha(a: Image.Image, b: Image.Image) -> bool:
    """Whether two pictures are transparent at the same places, as far as a resize leaves them."""
    if not (a.has_transparency_data or b.has_transparency_data):
        return True
    x, y = (np.asarray(image.convert("RGBA").getchannel("A"), np.float32) for image in (a, b))
    if x.shape != y.shape:
        x, y = _one_size(x, y)
    return float(np.abs(x - y).mean()) < ALPHA_DIFFERENCE


def _same_colours(a: Image.Image, b: Image.Image) -> bool:
    """Whether pictures of one luma have one colour everywhere; of different sizes, at the smaller one."""
    size = min(a.width, b.width), min(a.height, b.height)
    x, y = (image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in (a, b))
    return bool((np.asarray(x) == np.asarray(y)).all())


def _one_size(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = np.minimum(x.shape, y.shape).tolist()
    resized = (Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS) for array in (x, y))
    first, second = (np.asarray(image, np.float32) for image in resized)
    return first, second


def _compressed_like(source: bytes, like: bytes) -> bytes | None:
    """`source` as a JPEG with the tables and the sampling of `like`; None where that is no JPEG of this size."""
    target: Any = Image.open(io.BytesIO(like))
    image = Image.open(io.BytesIO(source))
    if target.format != "JPEG" or image.size != target.size:
        return None
    data = io.BytesIO()
    sampling = {} if target.mode == "L" else {"subsampling": get_sampling(target)}
    image.convert(target.mode).save(data, "JPEG", qtables=target.quantization, **sampling)
    return data.getvalue()
