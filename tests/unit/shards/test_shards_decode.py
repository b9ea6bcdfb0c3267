from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from sslscale.shards import decode
from sslscale.shards.decode import DecodeError, decode_image, known_label, label_of


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


def animation(format: str) -> bytes:
    data = io.BytesIO()
    frames = [Image.fromarray(COLOUR + value) for value in (0, 50, 100)]
    frames[0].save(data, format, save_all=True, append_images=frames[1:])
    return data.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_the_content_need_not_be_what_the_extension_says(format, channels):
    for extension in ("jpg", "png", "webp", "bmp"):
        assert decode_image({extension: encode(COLOUR, format)}, channels, None).shape == (channels, 6, 8)


def test_transparency_is_no_channel():
    transparent = np.dstack([COLOUR, GREY])
    for format in ("PNG", "WEBP"):
        assert decode_image({"jpg": encode(transparent, format)}, 1, None).shape == (1, 6, 8)
        assert decode_image({"jpg": encode(transparent, format)}, 3, None).shape == (3, 6, 8)


def test_an_animation_says_why():
    for format in ("GIF", "WEBP"):
        with pytest.raises(DecodeError, match=r"the \.jpg cannot be decoded: .*[Aa]nimat"):
            decode_image({"jpg": animation(format)}, 3, None)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_cameras_orientation_is_applied(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :8] = 200
    decoded = decode_image({"jpg": encode(pixels, format, exif=exif)}, 1, None)
    assert decoded.shape == (1, 32, 16)
    assert decoded[0, :8].mean() > 190 and decoded[0, 8:].mean() < 10


def test_several_members_that_could_be_the_image():
    first, second = encode(GREY, "PNG"), encode(GREY + 100, "PNG")
    plain = decode_image({"png": first}, 1, None)
    assert np.array_equal(decode_image({"seg.png": second, "png": first, "x.png": second}, 1, None), plain)
    assert np.array_equal(decode_image({"txt": b"words", "000001.png": first}, 1, None), plain)
    with pytest.raises(DecodeError, match=r"which image is it\? 000001\.png 000002\.png share a key"):
        decode_image({"000001.png": first, "000002.png": second}, 1, None)


def test_a_png_with_a_flipped_bit_says_why():
    data = encode(COLOUR, "PNG")
    start = data.index(b"IDAT")
    for place in (start + 4, start + 20, len(data) - 13):  # of the pixels, and of their checksum
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(DecodeError, match=r"the \.png cannot be decoded: its pixels fail their checksum"):
            decode_image({"png": flipped}, 3, None)


def claiming(side: int) -> bytes:
    """A BMP whose header claims that many pixels a side."""
    data, claimed = encode(GREY, "BMP"), side.to_bytes(4, "little")
    return data[:18] + claimed + claimed + data[26:]


def test_an_image_of_too_many_pixels_says_why():
    for side in (10_000, 100_000):  # PIL warns of the one and refuses the other
        with pytest.raises(DecodeError, match="cannot be decoded"):
            decode_image({"bmp": claiming(side)}, 1, None)


def with_size(format: str, width: int, height: int, **options) -> bytes:
    """A small picture whose header claims so many pixels."""
    data = bytearray(encode(COLOUR, format, **options))
    if format == "PNG":
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif format == "JPEG":
        marker = b"\xff\xc2" if options.get("progressive") else b"\xff\xc0"
        at = data.index(marker)
        data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    elif data[12:16] == b"VP8 ":
        data[26:30] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    elif data[12:16] == b"VP8L":
        data[21:25] = (width - 1 | height - 1 << 14).to_bytes(4, "little")
    else:
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "comment": b"\xff\xc0" * 20}), ("WEBP", {}),
     ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif"}), ("GIF", {})],
)  # fmt: skip
def test_a_picture_that_claims_too_many_pixels_is_refused_by_its_header(monkeypatch, format, options):
    side = 16_383
    data = encode(COLOUR, "GIF") if format == "GIF" else with_size(format, side, side, **options)
    if format == "GIF":
        data = data[:6] + side.to_bytes(2, "little") * 2 + data[10:]
    monkeypatch.setattr(decode, "_decode_bytes", None)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    with pytest.raises(DecodeError, match=r"the \.jpg claims 268,402,689 pixels: 134,217,728 are allowed"):
        decode_image({"jpg": data}, 3, None)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_header_that_is_cut_anywhere_is_no_more_than_an_undecodable_picture(format):
    data = encode(COLOUR, format)
    for length in range(1, len(data) - 30):
        with pytest.raises(DecodeError):
            decode_image({"jpg": data[:length]}, 3, None)


def test_an_image_that_would_be_enlarged_beyond_all_bounds_says_why():
    long = np.zeros((1, 30_000), np.uint8)
    assert decode_image({"png": encode(long, "PNG")}, 1, None).shape == (1, 1, 30_000)
    assert decode_image({"png": encode(long, "PNG")}, 1, 4).shape == (1, 4, 4)
    with pytest.raises(DecodeError, match=r"the \.png of 1x30000 pixels would be 224x6720000"):
        decode_image({"png": encode(long, "PNG")}, 1, 224)


def test_a_label_that_is_no_integer_is_none_where_it_is_not_needed():
    assert [known_label({"cls": text}) for text in (b"7", b"cat", b"9223372036854775808")] == [7, None, None]
    assert known_label({"png": b""}) is None


def test_labels():
    assert label_of({"cls": b"7"}) == 7
    assert label_of({"png": b""}) is None
    with pytest.raises(DecodeError, match="not an integer"):
        label_of({"cls": b"cat"})
    assert label_of({"cls": b"-9223372036854775808"}) == -(2**63) and label_of({"cls": b"9223372036854775807"})
    for text in (b"9223372036854775808", b"-9223372036854775809"):
        with pytest.raises(DecodeError, match="64 bits"):
            label_of({"cls": text})
