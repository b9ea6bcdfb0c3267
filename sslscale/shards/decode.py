"""From a sample's bytes to pixels and labels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_bytes
from torchvision.transforms.v2 import functional

from sslscale.shards.tar import IMAGES, SampleError

_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


class DecodeError(SampleError):
    """A sample whose members cannot be decoded; `reason` says why."""


def decode_image(sample: dict[str, Any], channels: int, size: int | None) -> np.ndarray:
    """The sample's first image as uint8 (C, H, W), `channels` being 1 or 3.

    With `size`, its shorter side is resized to that (bilinear, antialiased) and the centre size x size kept.
    """
    extension, data = _image_member(sample)
    try:
        image = _decode(extension, data, channels)  # (C, H, W)
    except (RuntimeError, ValueError, OSError) as error:
        raise DecodeError(f"the .{extension} cannot be decoded: {str(error).splitlines()[0]}") from None
    if image.dtype != torch.uint8:
        raise DecodeError(f"the .{extension} has 16 bits a channel: 8 are supported")
    if size is not None and image.shape[1:] != (size, size):
        image = functional.center_crop(functional.resize(image, [size], antialias=True), [size, size])
    return image.numpy()


def label_of(sample: dict[str, Any]) -> int | None:
    """The sample's `.cls`, or None where it has none. Raises DecodeError where it is not an integer."""
    text = sample.get("cls")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise DecodeError(f"the .cls is not an integer: {text[:20]!r}") from None


def _image_member(sample: dict[str, Any]) -> tuple[str, bytes]:
    for extension, data in sample.items():
        if extension.rpartition(".")[2] in IMAGES:
            return extension, data
    members = [extension for extension in sample if not extension.startswith("__")]
    raise DecodeError(f"no image among the members: {' '.join(members)}")


def _decode(extension: str, data: bytes, channels: int) -> torch.Tensor:
    if not data:
        raise ValueError("it is empty")
    if extension.endswith("bmp"):  # torchvision reads no BMP
        image = Image.open(io.BytesIO(data), formats=["BMP"]).convert("L" if channels == 1 else "RGB")
        return functional.pil_to_tensor(image)
    return decode_bytes(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=_MODES[channels])
