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


def test_labels():
    assert label_of({"cls": b"7"}) == 7
    assert label_of({"png": b""}) is None
    with pytest.raises(DecodeError, match="not an integer"):
        label_of({"cls": b"cat"})
