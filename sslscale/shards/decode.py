"""From a sample's bytes to pixels and labels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional

from sslscale.shards.tar import IMAGES, SampleError

_MOST_PIXELS = 2**27  # of a picture: no camera takes so many, and a file of a few megabytes can claim billions
_MOST_VALUES = 2**27  # that resizing may make of a sample that has fewer: a picture one pixel high would fill gigabytes
_LABELS = range(-(2**63), 2**63)

# What torchvision.io.decode_image calls, without what it does besides: a quarter of the time of a small picture.
_decode_bytes = torch.ops.image.decode_image
_MODES = {1: ImageReadMode.GRAY.value, 3: ImageReadMode.RGB.value}
_PNG_HEADER = 33  # bytes of the signature and of the first chunk
_PNG_CHUNK = struct.Struct(">I4s").unpack_from  # length, kind; then the data and a checksum of kind and data
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # of a JPEG: SOF0 to SOF15
_BARE_MARKERS = frozenset((0x00, 0x01, *range(0xD0, 0xD8), 0xFF))  # nothing follows them; 00 and FF are no markers


class DecodeError(SampleError):
    """A sample whose members cannot be decoded; `reason` says why."""


def decode_image(sample: dict[str, Any], channels: int, size: int | None) -> np.ndarray:
    """The sample's image as uint8 (C, H, W), `channels` being 1 or 3; see find_member.

    The bytes say what they are, whatever the extension: PNG, JPEG, WebP, BMP, or a GIF of one picture. The orientation
    that a camera left in a JPEG or PNG (EXIF) is applied. With `size`, the shorter side is resized to that (bilinear,
    antialiased) and the centre size x size kept. Raises DecodeError where it cannot be decoded, is an animation, has 16
    bits a channel, or more than 2^27 pixels, which are told from the header.
    """
    extension, data = find_member(sample, IMAGES, "image")
    try:
        image = _decode(extension, data, channels)  # (C, H, W)
    except (RuntimeError, ValueError) as error:
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
    """The sample's image, encoded as it is in the shard; see find_member."""
    return find_member(sample, IMAGES, "image")[1]


def find_member(sample: dict[str, Any], extensions: Sequence[str], kind: str) -> tuple[str, bytes]:
    """(extension, bytes) of the sample's first member of these extensions: `png`, or else its only `seg.png`.

    Raises DecodeError where it has none, and where it has several of the second form: one of many is nobody's choice.
    """
    for extension, data in sample.items():
        if extension in extensions:
            return extension, data
    named = [extension for extension in sample if extension.rpartition(".")[2] in extensions]
    if len(named) == 1:
        return named[0], sample[named[0]]
    if named:
        raise DecodeError(f"which {kind} is it? {_first(named)} share a key, which ends at the first dot of a name")
    members = [extension for extension in sample if not extension.startswith("__")]
    raise DecodeError(f"no {kind} among the members: {_first(members)}")


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


def known_label(sample: dict[str, Any]) -> int | None:
    """`label_of`, and None of a label that is no integer, too: only measures use labels, the sample is not lost."""
    try:
        return label_of(sample)
    except DecodeError:
        return None


def _first(names: Sequence[str], count: int = 5) -> str:
    return " ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _decode(extension: str, data: bytes, channels: int) -> torch.Tensor:
    if not data:
        raise ValueError("it is empty")
    magic = data[:2]
    if magic in _BY_PIL:
        return _decode_by_pil(extension, data, channels)
    if magic in _CLAIMED:
        _check_pixels(extension, _CLAIMED[magic](data))
    read_as = 3 if magic == _WEBP else channels  # torchvision makes no grey of WebP
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = _decode_bytes(encoded, _MODES[read_as], True)  # with the orientation that EXIF tells
    return image if read_as == channels else functional.rgb_to_grayscale(image)


def _decode_by_pil(extension: str, data: bytes, channels: int) -> torch.Tensor:
    try:
        image = Image.open(io.BytesIO(data), formats=["BMP", "GIF"])  # reads the header only
        _check_pixels(extension, image.width * image.height)
        if getattr(image, "is_animated", False):
            raise ValueError("it is an animation")
        return functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    except DecodeError:
        raise
    except Exception as error:  # of a damaged file it raises whatever it trips over
        raise ValueError(str(error) or type(error).__name__) from None


def _check_pixels(extension: str, claimed: int) -> None:
    if claimed > _MOST_PIXELS:
        raise DecodeError(f"the .{extension} claims {claimed:,} pixels: {_MOST_PIXELS:,} are allowed")


# ------------------------------------------------------------------ width times height, as a header claims


def _png_pixels(data: bytes) -> int:
    """Of the first chunk, IHDR: 32 bits each.

    Raises ValueError where pixels fail their checksum: torchvision (0.29) reports what is wrong before the pixels, and
    for what is wrong in them it ends the process.
    """
    view, at, kind = memoryview(data), _PNG_HEADER, b""
    while kind != b"IEND" and at + 8 <= len(data):
        length, kind = _PNG_CHUNK(data, at)
        end = at + 8 + length
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("its pixels fail their checksum")
        at = end + 4
    size = int.from_bytes(view[16:24], "big")
    return (size >> 32) * (size & 0xFFFFFFFF)


def _jpeg_pixels(data: bytes) -> int:
    """Of the first frame header (ITU-T T.81, B.2.2). What stands between segments is skipped, as decoders do."""
    at, last = 2, len(data) - 9
    while 0 <= at <= last:
        if data[at] != 0xFF:
            at = data.find(b"\xff", at)
            continue
        marker = data[at + 1]
        if marker in _FRAME_MARKERS:
            return (data[at + 5] << 8 | data[at + 6]) * (data[at + 7] << 8 | data[at + 8])
        at += 1 if marker in _BARE_MARKERS else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def _webp_pixels(data: bytes) -> int:
    """Of the first chunk: VP8 (RFC 6386, 9.1), VP8L (14 bits each, less one) or VP8X (24 bits each, less one)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        return (int.from_bytes(data[26:28], "little") & 0x3FFF) * (int.from_bytes(data[28:30], "little") & 0x3FFF)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    return (int.from_bytes(data[24:27], "little") + 1) * (int.from_bytes(data[27:30], "little") + 1)


# By the first two bytes: every sample comes by here, so there is one look-up. More of a magic number is the decoder's.
_WEBP = b"RI"
_BY_PIL = frozenset((b"BM", b"GI"))  # torchvision reads no BMP, and of a GIF all pictures at once
_CLAIMED = {b"\x89P": _png_pixels, b"\xff\xd8": _jpeg_pixels, _WEBP: _webp_pixels}
