"""One picture encoded again is told from pictures that are only alike."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from sslscale.dedup.compare import low_share, same_picture

PHOTO = load_sample_images().images[0]


def encoded(pixels, format="PNG", **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format, **options)
    return data.getvalue()


def crop(x, y, side=64, grey=False):
    pixels = PHOTO[y : y + side, x : x + side]
    return pixels.mean(axis=2).astype(np.uint8) if grey else pixels


@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize(("format", "options"), [
    ("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"quality": 50}), ("JPEG", {"quality": 15}),
])  # fmt: skip
def test_a_jpeg_explains_the_difference_by_itself(format, options, grey):
    for x in (0, 100, 300):
        pixels = crop(x, 150, grey=grey)
        again = encoded(pixels, format, **options)
        assert same_picture(encoded(pixels), again, stands_out=False)
        assert same_picture(again, encoded(pixels), stands_out=False)
        assert same_picture(encoded(pixels, "JPEG", quality=75), again, stands_out=True)


@pytest.mark.parametrize("quality", [50, 80])
def test_another_encoder_leaves_the_low_frequencies(quality):
    pixels = crop(100, 150)
    again = encoded(pixels, "WEBP", quality=quality)
    assert same_picture(encoded(pixels), again, stands_out=True)
    assert not same_picture(encoded(pixels), again, stands_out=False)


def test_another_size_of_the_same_picture():
    pixels = crop(100, 150, side=128)
    small = np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.LANCZOS))
    assert same_picture(encoded(pixels), encoded(small, "JPEG", quality=85), stands_out=True)


@pytest.mark.parametrize("change", ["moved", "brighter", "part"])
def test_only_alike(change):
    pixels = crop(100, 150)
    other = {
        "moved": crop(101, 150),
        "brighter": np.minimum(pixels * 1.1, 255).astype(np.uint8),
        "part": np.where(np.arange(64)[:, None, None] < 8, 128, pixels).astype(np.uint8),
    }[change]
    for format, options in (("PNG", {}), ("JPEG", {"quality": 80})):
        again = encoded(other, format, **options)
        assert not same_picture(encoded(pixels), again, stands_out=False)
        assert not same_picture(encoded(pixels), again, stands_out=True) or change == "moved"


def test_share_of_low_frequencies():
    noise = np.random.default_rng(0).normal(size=(400, 400))
    assert low_share(noise) == pytest.approx(1 / 16, rel=0.02)
    assert low_share(np.ones((8, 9))) == pytest.approx(1)
    assert low_share(np.indices((8, 8)).sum(axis=0) % 2 * 2.0 - 1) == pytest.approx(0)


def shape(kind, colour=(0, 0, 0), size=32):
    """A disc or a bar of one colour on nothing."""
    rows, columns = np.mgrid[:size, :size]
    inside = (rows - 16) ** 2 + (columns - 16) ** 2 < 100 if kind == "disc" else np.abs(rows - columns) < 5
    return np.dstack([*(np.full((size, size), value, np.uint8) for value in colour), (255 * inside).astype(np.uint8)])


@pytest.mark.parametrize("stands_out", [True, False])
def test_transparency_is_part_of_a_picture(stands_out):
    disc, bar, red = encoded(shape("disc")), encoded(shape("bar")), encoded(shape("disc", (255, 0, 0)))
    assert not same_picture(disc, bar, stands_out=stands_out)
    assert not same_picture(disc, red, stands_out=stands_out)
    again = encoded(shape("disc"), "WEBP", lossless=True)
    assert same_picture(disc, again, stands_out=stands_out) and same_picture(red, red, stands_out=stands_out)
    opaque = np.dstack([crop(0, 0), np.full((64, 64), 255, np.uint8)])
    assert same_picture(encoded(opaque), encoded(crop(0, 0)), stands_out=stands_out)


def test_equal_luma_is_no_equal_colour():
    red, green = (np.tile(np.array(colour, np.uint8), (16, 16, 1)) for colour in ((255, 0, 0), (0, 129, 0)))
    luma = [np.asarray(Image.fromarray(pixels).convert("L"))[0, 0] for pixels in (red, green)]
    assert luma[0] == luma[1]
    assert not same_picture(encoded(red), encoded(green), stands_out=True)
    assert same_picture(encoded(red), encoded(red[:8, :8]), stands_out=True)


def test_pictures_without_a_block_have_no_low_frequencies():
    thin = np.random.default_rng(0).integers(0, 255, (2, 3, 64), np.uint8)
    assert not same_picture(encoded(thin[0]), encoded(thin[1]), stands_out=True)
