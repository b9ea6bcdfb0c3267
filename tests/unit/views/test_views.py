"""Views are keyed by sample: the same sample gets the same view, whatever batch or rank it is in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.views.crops import Crops, multi_crop
from sslscale.views.image import _crop_sides, augment, crop_at, jitter, rotate_quarter, to_float, warp
from sslscale.views.keyed import _GOLDEN, KeyedRandom, _mixed_by_torch, _signed, mix
from sslscale.views.pretext import NEIGHBOUR_CELLS, PatchPair, Rotated

EVERYTHING = AugmentConfig(
    size=12,
    crop_scale=(0.3, 0.9),
    rotate_degrees=20,
    shear_degrees=10,
    shift=0.1,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.3,
    blur=0.5,
    blur_sigma=(0.1, 1.0),
    solarize=0.3,
    noise=0.05,
    erase=0.5,
)
PLAIN = AugmentConfig(size=12, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


def keyed(ids, seed=0, epoch=0):
    ids = torch.as_tensor(ids)
    return KeyedRandom.of(seed, torch.full_like(ids, epoch), ids)


def images(n, channels=3, size=16):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_mixing_is_splitmix64s_by_numpy_and_by_torch():
    seeds = torch.tensor([1234567, 1234567 + _signed(_GOLDEN)])  # the state before the first and the second number
    published = [6457827717110365317, 3203168211198807973]  # by the generator's own C code
    assert mix(seeds).tolist() == published
    keys = torch.randint(-(2**63), 2**63 - 1, (3, 1), generator=torch.Generator().manual_seed(0)).expand(3, 5)
    kept = keys.clone()
    assert torch.equal(mix(keys), _mixed_by_torch(keys + _signed(_GOLDEN)))
    assert torch.equal(keys, kept)
    assert torch.equal(mix(keys[0, 0]), mix(keys)[0, 0]) and mix(keys[:0]).shape == (0, 5)


def test_draws_depend_on_seed_epoch_sample_and_name_only():
    whole = keyed(range(100)).uniform("a", shape=(3,))
    assert torch.equal(keyed(range(40, 60)).uniform("a", shape=(3,)), whole[40:60])
    others = (keyed(range(100), seed=1), keyed(range(100), epoch=1), keyed(range(100)).fold("view"))
    for other in others:
        assert (other.uniform("a", shape=(3,)) == whole).float().mean() < 0.01
    assert (keyed(range(100)).uniform("b", shape=(3,)) == whole).float().mean() < 0.01


def test_draws_have_the_distributions_they_name():
    random = keyed(range(200_000))
    uniform = random.uniform("u", -1.0, 3.0)
    assert uniform.min() >= -1.0 and uniform.max() < 3.0
    assert uniform.mean() == pytest.approx(1.0, abs=0.02) and uniform.std() == pytest.approx(4 / 12**0.5, abs=0.02)
    normal = random.normal("n")
    assert normal.mean() == pytest.approx(0.0, abs=0.02) and normal.std() == pytest.approx(1.0, abs=0.02)
    counts = random.integers("i", 7).bincount(minlength=7).numpy()
    assert len(counts) == 7 and np.abs(counts / 200_000 - 1 / 7).max() < 0.005
    assert random.flag("f", 0.3).float().mean() == pytest.approx(0.3, abs=0.01)
    neighbours = torch.corrcoef(torch.stack([uniform[:-1], uniform[1:]]))[0, 1]
    assert abs(neighbours) < 0.01


def test_permutations_are_permutations_and_differ_between_samples():
    permutations = keyed(range(50)).permutation("p", 9)
    assert torch.equal(permutations.sort(dim=1).values, torch.arange(9).expand(50, 9))
    assert len(permutations.unique(dim=0)) > 45


def test_a_view_does_not_depend_on_its_batch():
    batch = images(8)
    whole = augment(batch, keyed(range(8)), EVERYTHING)
    part = augment(batch[3:5], keyed([3, 4]), EVERYTHING)
    torch.testing.assert_close(part, whole[3:5], rtol=0, atol=1e-6)
    assert whole.shape == (8, 3, 12, 12) and whole.min() >= 0 and whole.max() <= 1


def test_without_strength_a_view_is_the_resampled_image():
    batch = images(4, size=12)
    torch.testing.assert_close(augment(batch, keyed(range(4)), PLAIN), batch, rtol=0, atol=1e-5)


def test_a_flip_mirrors_and_a_shift_moves():
    batch = images(2, size=12)
    flipped = warp(batch, keyed([0, 1]), PLAIN.model_copy(update={"flip": 1.0}), 12)
    torch.testing.assert_close(flipped, batch.flip(3), rtol=0, atol=1e-5)
    moved = warp(batch, keyed([0, 1]), PLAIN.model_copy(update={"shift": 0.3}), 12)
    assert (moved - batch).abs().mean() > 0.05


def test_jitter_leaves_grey_images_one_channel_and_keeps_the_range():
    out = jitter(images(4, channels=1), keyed(range(4)), EVERYTHING)
    assert out.shape == (4, 1, 16, 16) and out.min() >= 0 and out.max() <= 1


def test_two_crops_of_one_image_differ():
    views = Crops({"view_1": EVERYTHING, "view_2": EVERYTHING})(images(4), keyed(range(4)))
    assert (views["view_1"] - views["view_2"]).abs().mean() > 0.05


def test_multi_crop_gives_two_global_views_then_small_ones_of_small_parts():
    spec = multi_crop(PLAIN, local_crops=3, local_size=None, local_scale=(0.1, 0.1))
    # each pixel's value is its column, so that a view's range says how much of the width it covers
    batch = torch.linspace(0, 1, 48).expand(4, 1, 48, 48)
    views = spec(batch, keyed(range(4)))
    assert [*views] == ["global_1", "global_2", "local_1", "local_2", "local_3"]
    assert [view.shape[-1] for view in views.values()] == [12, 12, 5, 5, 5]
    width = {name: view.amax(dim=(1, 2, 3)) - view.amin(dim=(1, 2, 3)) for name, view in views.items()}
    assert (width["global_1"] > 0.9).all() and (width["local_1"] < 0.35).all()
    assert (views["local_1"] - views["local_2"]).abs().mean() > 0.05
    assert multi_crop(PLAIN, 1, 7, (0.1, 0.2)).recipes["local_1"].size == 7


def test_quarter_turns():
    batch = images(4)
    turned = rotate_quarter(batch, torch.arange(4))
    for k in range(4):
        assert torch.equal(turned[k], torch.rot90(batch[k], k, dims=(1, 2)))


def test_rotated_says_how_far_it_turned():
    views = Rotated(PLAIN)(images(64, size=12), keyed(range(64)))
    back = rotate_quarter(views["view"], (4 - views["turns"]) % 4)
    torch.testing.assert_close(back, images(64, size=12), rtol=0, atol=1e-5)
    assert set(views["turns"].tolist()) == {0, 1, 2, 3}


def test_patches_come_from_where_the_position_says():
    size, patch, gap = 24, 6, 1
    # each pixel's value says in which cell of the 3 x 3 grid it lies
    cells = torch.arange(9.0).view(3, 3).repeat_interleave(8, 0).repeat_interleave(8, 1) / 10
    batch = cells.expand(64, 1, size, size).contiguous()
    recipe = PLAIN.model_copy(update={"size": size})
    views = PatchPair(recipe, patch, gap)(batch, keyed(range(64)))
    assert views["centre"].shape == (64, 1, patch, patch)
    rows, columns = torch.tensor(NEIGHBOUR_CELLS)[views["position"]].T
    expected = (rows * 3 + columns)[:, None, None, None] / 10
    torch.testing.assert_close(views["neighbour"], expected.expand_as(views["neighbour"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(views["centre"], torch.full_like(views["centre"], 0.4), rtol=0, atol=1e-5)
    assert set(views["position"].tolist()) == set(range(8))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="patch_size"):
        PatchPair(AugmentConfig(size=24), patch_size=8, gap=1)


def test_crop_at_cuts_without_resampling():
    batch = images(2)
    cut = crop_at(batch, torch.tensor([1, 4]), torch.tensor([0, 5]), 3)
    assert torch.equal(cut[0], batch[0, :, 1:4, 0:3]) and torch.equal(cut[1], batch[1, :, 4:7, 5:8])


def test_to_float_scales_bytes():
    assert torch.equal(to_float(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)), torch.tensor([[[[0.0, 1.0]]]]))


CROPS = [((0.2, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.75, 4 / 3)), ((1.0, 1.0), (2.0, 3.0))]


@pytest.mark.parametrize(("scale", "ratio"), CROPS)
def test_crops_are_drawn_as_torchvision_draws_them(scale, ratio):
    recipe = PLAIN.model_copy(update={"crop_scale": scale, "crop_ratio": ratio})
    width, height = _crop_sides(keyed(range(5000)), recipe)
    torch.manual_seed(0)
    # of a large image, so that their rounding to pixels does not show
    theirs = [RandomResizedCrop.get_params(torch.empty(1, 4000, 4000), list(scale), list(ratio)) for _ in range(5000)]
    _, _, rows, columns = np.array(theirs).T / 4000
    assert width.max() <= 1 and height.max() <= 1
    for ours, other in ((width, columns), (height, rows), (width * height, rows * columns)):
        deciles = np.linspace(0.1, 0.9, 9)
        np.testing.assert_allclose(np.quantile(ours.numpy(), deciles), np.quantile(other, deciles), atol=0.02)


def test_an_edge_keeps_its_brightness_and_the_outside_is_black():
    white = torch.ones(500, 1, 8, 8)
    crops = warp(white, keyed(range(500)), PLAIN.model_copy(update={"crop_scale": (0.2, 1.0)}), 8)
    torch.testing.assert_close(crops, torch.ones_like(crops))
    moved = warp(white, keyed(range(500)), PLAIN.model_copy(update={"shift": 0.4, "rotate_degrees": 30}), 8)
    assert set(moved.round(decimals=5).unique().tolist()) == {0.0, 1.0}


def test_a_crop_of_more_pixels_than_its_view_is_averaged():
    noise = torch.randn(32, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    far = warp(noise, keyed(range(32)), PLAIN, 8)
    torch.testing.assert_close(far, F.avg_pool2d(noise, 8))  # bilinear samples of single pixels have a deviation of .5
    near = PLAIN.model_copy(update={"crop_scale": (1 / 64, 1 / 64)})  # as many pixels as the view has
    assert warp(noise, keyed(range(32)), near, 8).std() > 0.4


def test_where_a_patch_lies_says_nothing_of_its_colours():
    recipe = PLAIN.model_copy(update={"size": 24, "brightness": 0.5, "jitter_probability": 0.5})
    gradient = torch.linspace(0.1, 0.6, 24)[:, None]
    for images in (gradient.expand(2000, 1, 24, 24), gradient.T.expand(2000, 1, 24, 24)):  # down, across
        patch = PatchPair(recipe, 4, 0)(images, keyed(range(2000)))["centre"][:, 0]
        factor = (patch[:, 1, 1] - patch[:, 0, 0]) / (0.5 / 23)
        assert factor.min() > 0.49 and factor.max() < 1.51  # once, not the whole and the patch
        corner = (patch[:, 0, 0] / factor).round(decimals=3)
        shares = [((factor - 1).abs() > 1e-3)[corner == at].float().mean().item() for at in corner.unique()]
        assert shares == pytest.approx([0.5] * 5, abs=0.1)
