from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sslscale.shards.decode import DecodeError, decode_image, label_of


def encode(array: np.ndarray, format: str, **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, format, **options)
    return data.getvalue()


GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
COLOUR = np.stack([GREY, GREY + 50, GREY + 100], axis=-1)


@pytest.mark.parametrize("format", ["png", "bmp", "webp"])
def test_lossless_images_come_back_as_they_were(format):
    options = {"lossless": True} if format == "webp" else {}
    decoded = decode_image({"__key__": "x", format: encode(COLOUR, format.upper(), **options)}, 3, None)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, COLOUR.transpose(2, 0, 1))


def test_grey_and_colour_are_converted_to_the_channels_asked_for():
    assert np.array_equal(decode_image({"png": encode(GREY, "PNG")}, 3, None), np.stack([GREY] * 3))
    for format in ("jpeg", "webp", "png"):
        assert decode_image({format: encode(COLOUR, format.upper())}, 1, None).shape == (1, 6, 8)


def test_the_centre_is_kept_at_the_size_asked_for():
    image = np.zeros((40, 80), np.uint8)
    image[:, 20:60] = 200
    decoded = decode_image({"png": encode(image, "PNG")}, 1, 20)
    assert decoded.shape == (1, 20, 20)
    assert (decoded[:, :, 1:-1] == 200).all()


@pytest.mark.parametrize(
    ("sample", "reason"),
    [({"__key__": "x", "cls": b"1"}, "no image among the members: cls"), ({"png": b""}, "empty"),
     ({"png": b"no image"}, "cannot be decoded"), ({"jpg": encode(COLOUR, "JPEG")[:-200]}, "cannot be decoded"),
     ({"png": encode(COLOUR, "PNG")[:60]}, "cannot be decoded"), ({"bmp": b"no image"}, "cannot be decoded"),
     ({"png": encode(GREY.astype(np.uint16) * 1000, "PNG")}, "16 bits")],
)  # fmt: skip
def test_what_is_no_image_says_why(sample, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_image(sample, 1, None)


def claiming(side: int) -> bytes:
    """A BMP whose header claims that many pixels a side."""
    data, claimed = encode(GREY, "BMP"), side.to_bytes(4, "little")
    return data[:18] + claimed + claimed + data[26:]


def test_an_image_of_too_many_pixels_says_why():
    for side in (10_000, 100_000):  # PIL warns of the one and refuses the other
        with pytest.raises(DecodeError, match="cannot be decoded"):
            decode_image({"bmp": claiming(side)}, 1, None)


def test_an_image_that_would_be_enlarged_beyond_all_bounds_says_why():
    long = np.zeros((1, 30_000), np.uint8)
    assert decode_image({"png": encode(long, "PNG")}, 1, None).shape == (1, 1, 30_000)
    assert decode_image({"png": encode(long, "PNG")}, 1, 4).shape == (1, 4, 4)
    with pytest.raises(DecodeError, match=r"the \.png of 1x30000 pixels would be 224x6720000"):
        decode_image({"png": encode(long, "PNG")}, 1, 224)


def test_labels():
    assert label_of({"cls": b"7"}) == 7
    assert label_of({"png": b""}) is None
    with pytest.raises(DecodeError, match="not an integer"):
        label_of({"cls": b"cat"})
    assert label_of({"cls": b"-9223372036854775808"}) == -(2**63) and label_of({"cls": b"9223372036854775807"})
    for text in (b"9223372036854775808", b"-9223372036854775809"):
        with pytest.raises(DecodeError, match="64 bits"):
            label_of({"cls": text})
