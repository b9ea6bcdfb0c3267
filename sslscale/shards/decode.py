"""From a sample's bytes to pixels and labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_bytes
from torchvision.transforms.v2 import functional

from sslscale.shards.tar import IMAGES, SampleError

_MOST_VALUES = 2**27  # that resizing may make of a sample that has fewer: a picture one pixel high would fill gigabytes
_LABELS = range(-(2**63), 2**63)

_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


class DecodeError(SampleError):
    """A sample whose members cannot be decoded; `reason` says why."""


def decode_image(sample: dict[str, Any], channels: int, size: int | None) -> np.ndarray:
    """The sample's first image as uint8 (C, H, W), `channels` being 1 or 3.

    With `size`, its shorter side is resized to that (bilinear, antialiased) and the centre size x size kept.
    """
    extension, data = find_member(sample, IMAGES, "image")
    try:
        image = _decode(extension, data, channels)  # (C, H, W)
    except (RuntimeError, ValueError, OSError, Image.DecompressionBombError) as error:
        raise DecodeError(f"the .{extension} cannot be decoded: {str(error).splitlines()[0]}") from None
    if image.dtype != torch.uint8:
        raise DecodeError(f"the .{extension} has 16 bits a channel: 8 are supported")
    return (image if size is None else fit_square(image, size, extension)).numpy()


def fit_square(pixels: torch.Tensor, size: int, extension: str) -> torch.Tensor:
    """(..., H, W) with the shorter side resized to `size` (bilinear, antialiased), and of that the centre square.

    Raises DecodeError where the picture is so long that this would take gigabytes.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    shorter = min(height, width)
    resized = (size * height // shorter, size * width // shorter)
    if pixels.numel() // (height * width) * resized[0] * resized[1] > max(_MOST_VALUES, pixels.numel()):
        enlarged = f"{resized[0]}x{resized[1]}"
        raise DecodeError(
            f"the .{extension} of {height}x{width} pixels would be {enlarged} before it is cut to a square"
        )
    return functional.center_crop(functional.resize(pixels, [size], antialias=True), [size, size])


def image_bytes(sample: dict[str, Any]) -> bytes:
    """The sample's first image, encoded as it is in the shard. Raises DecodeError where it has none."""
    return find_member(sample, IMAGES, "image")[1]


def find_member(sample: dict[str, Any], extensions: Sequence[str], kind: str) -> tuple[str, bytes]:
    """(extension, bytes) of the sample's first member of these extensions. Raises DecodeError where it has none."""
    for extension, data in sample.items():
        if extension.rpartition(".")[2] in extensions:
            return extension, data
    members = [extension for extension in sample if not extension.startswith("__")]
    raise DecodeError(f"no {kind} among the members: {' '.join(members)}")


def label_of(sample: dict[str, Any]) -> int | None:
    """The sample's `.cls`, or None where it has none. Raises DecodeError where it is not an integer of 64 bits."""
    text = sample.get("cls")
    if text is None:
        return None
    try:
        label = int(text)
    except ValueError:
        raise DecodeError(f"the .cls is not an integer: {text[:20]!r}") from None
    if label not in _LABELS:
        raise DecodeError(f"the .cls is no integer of 64 bits: {text[:40]!r}")
    return label


def _decode(extension: str, data: bytes, channels: int) -> torch.Tensor:
    if not data:
        raise ValueError("it is empty")
    if extension.endswith("bmp"):  # torchvision reads no BMP
        image = Image.open(io.BytesIO(data), formats=["BMP"]).convert("L" if channels == 1 else "RGB")
        return functional.pil_to_tensor(image)
    read_as = 3 if extension.endswith("webp") else channels  # torchvision makes no grey of WebP
    image = decode_bytes(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=_MODES[read_as])
    return image if read_as == channels else functional.rgb_to_grayscale(image)
