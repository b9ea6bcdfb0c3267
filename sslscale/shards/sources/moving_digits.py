"""Clips of moving digits, made of scikit-learn's 1,797 real ones, after Moving MNIST (Srivastava et al. 2015).

Two different images of one digit go across the frame, each in a direction of its own, out at one side and in again at
the other. Labels: the digit (10), and the pair of directions (6); the other one lies in the sample's metadata.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from sslscale.errors import UserError, missing_package
from sslscale.shards.sources import Example

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # (rows, columns) a step
MOTIONS = list(itertools.combinations(DIRECTIONS, 2))
FRAMES, SIDE, _SCALE = 16, 32, 2
_HELD_OUT = 5  # of so many digits one belongs to `test`
_SPEEDS = (1, 2)  # pixels a frame, least and most


class MovingDigits:
    """Splits `train` and `test`, of `clips` and a quarter as many clips, from disjoint sets of digits.

    `label` says which of the two labels is the sample's: motion or digit.
    """

    def __init__(self, path: str | None = None, *, clips: int = 4000, label: str = "motion") -> None:
        if path is not None:
            raise UserError(
                "moving-digits come with scikit-learn and take no path", got=path, fix="leave out pack.path"
            )
        if label not in ("motion", "digit"):
            raise UserError("moving-digits have no such label", got=label, allowed="motion, digit")
        digits = load_digits()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(_SCALE, 1).repeat(_SCALE, 2)
        self.digits, self.label = digits.target, label
        self.splits = {"train": clips, "test": clips // 4}
        self.fingerprint = hashlib.sha256(self.images.tobytes() + f"{label} 1".encode()).hexdigest()

    def example(self, split: str, index: int) -> Example:
        frames, labels = self.clip(split, index)
        return Example(encode_mp4(frames), labels[self.label], "mp4", labels)

    def clip(self, split: str, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """uint8 (FRAMES, SIDE, SIDE) and {"digit", "motion"}."""
        rng = np.random.default_rng([list(self.splits).index(split), index])
        held_out = np.arange(len(self.digits)) % _HELD_OUT == 0
        mine = np.flatnonzero(held_out if split == "test" else ~held_out)
        digit, motion = int(rng.integers(10)), int(rng.integers(len(MOTIONS)))
        chosen = rng.choice(mine[self.digits[mine] == digit], 2, replace=False)
        frames = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
        for image, direction in zip(self.images[chosen], MOTIONS[motion], strict=True):
            start, speed = rng.integers(SIDE, size=2), rng.uniform(*_SPEEDS)
            canvas = np.zeros((SIDE, SIDE), np.uint8)
            canvas[: image.shape[0], : image.shape[1]] = image
            for time in range(FRAMES):
                shift = start + np.rint(speed * time).astype(int) * np.array(DIRECTIONS[direction])
                np.maximum(frames[time], np.roll(canvas, shift, axis=(0, 1)), out=frames[time])
        return frames, {"digit": digit, "motion": motion}


def encode_mp4(frames: np.ndarray, rate: int = 8, key_every: int = 8) -> bytes:
    """Grey frames uint8 (T, H, W) or coloured (T, H, W, 3) as H.264, the same bytes every time."""
    try:
        import av
    except ImportError:
        raise missing_package("av", "video") from None
    data = io.BytesIO()
    with av.open(data, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "fast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, key_every
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="gray" if pixels.ndim == 2 else "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return data.getvalue()
