"""Jigsaw, colorization, inpainting and MAE: targets and masks, against other people's code where there is some."""

import lightly.models.utils as lightly
import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from sslscale.config import AugmentConfig, BackboneConfig
from sslscale.errors import UserError
from sslscale.models.image import Backbone
from sslscale.objectives import build_objective
from sslscale.objectives.base import Moment
from sslscale.objectives.colorization import grey
from sslscale.objectives.inpainting import cell_mask
from sslscale.objectives.jigsaw import distant_permutations
from sslscale.objectives.mae import patchify, random_mask, split_mask
from sslscale.views.base import Batch
from sslscale.views.image import crop_at
from sslscale.views.keyed import KeyedRandom
from sslscale.views.lab import rgb_to_lab
from sslscale.views.pretext import ShuffledPatches

RESNET = BackboneConfig(
    architecture="resnet18", kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, stem="small", channels=3
)
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
STILL = AugmentConfig(size=18, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


def keyed(count):
    return KeyedRandom.of(0, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def mae(pool="token", channels=1, **kwargs):
    torch.manual_seed(0)
    config = BackboneConfig(
        architecture="vit_tiny_patch16_224", kwargs={**VIT, "global_pool": pool, **kwargs}, channels=channels
    )
    settings = {"name": "mae", "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    return build_objective(settings, Backbone(config), AugmentConfig(size=16))


def test_permutations_are_far_from_each_other_and_always_the_same():
    chosen = np.array(distant_permutations(100))
    assert (np.sort(chosen, axis=1) == np.arange(9)).all() and tuple(chosen[0]) == tuple(range(9))
    distance = (chosen[:, None] != chosen).sum(axis=2) + 9 * np.eye(100)
    assert distance.min() >= 6 and distance[:9, :9].min() == 9
    assert distant_permutations(20) == distant_permutations(100)[:20]


def test_shuffled_patches_lay_where_the_permutation_says():
    images = torch.rand(5, 1, 18, 18)
    orders = distant_permutations(4)
    made = ShuffledPatches(STILL, 6, 0, orders)(images, keyed(5))
    for image, patches, permutation in zip(images, made["patches"], made["permutation"], strict=True):
        for patch, cell in zip(patches, orders[permutation], strict=True):
            corner = torch.tensor([cell // 3 * 6]), torch.tensor([cell % 3 * 6])
            torch.testing.assert_close(patch[None], crop_at(image[None], *corner, 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["jigsaw", "context_prediction"])
def test_batch_norm_is_given_the_statistics_of_whole_images_in_the_end(name):
    class Settles:
        def settle(self, backbone):
            settled.append(backbone)

    settled = []
    objective = build_objective({"name": name, "patch_size": 4, "gap": 0}, Backbone(RESNET), STILL)
    for step in range(11):
        moment = Moment(step, 3, 10)
        if objective.prepares_at(moment):
            objective.prepare(Settles(), moment)
            assert step == 10
    assert settled == [objective.backbone]


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="3 x 3 grid"):
        ShuffledPatches(STILL, 7, 0, distant_permutations(4))


def test_lab_is_scikit_images():
    images = torch.rand(4, 3, 5, 6)
    expected = rgb2lab(images.permute(0, 2, 3, 1).double().numpy())
    np.testing.assert_allclose(rgb_to_lab(images).permute(0, 2, 3, 1).numpy(), expected, atol=2e-3)


def test_colorization_sees_no_colour_and_balances_the_colours_that_it_saw():
    objective = build_objective({"name": "colorization", "decoder_width": 8}, Backbone(RESNET), AugmentConfig(size=16))
    images = torch.rand(6, 3, 16, 16)
    objective(Batch({"view": images}, keyed(6), torch.arange(6)))
    target = objective.targets(images)
    torch.testing.assert_close(target.sum(dim=2), torch.ones(6, 16))
    objective.after_step(1.0)
    assert objective.prior.argmax() == target.mean(dim=(0, 1)).argmax()
    torch.testing.assert_close((objective.prior * objective.weights()).sum(), torch.tensor(1.0))
    assert objective.weights().argmin() == objective.prior.argmax()
    objective.eval()
    torch.testing.assert_close(objective.backbone(images), objective.backbone(grey(images)), rtol=1e-4, atol=1e-5)


def test_colorization_refuses_channels_that_would_not_stay_equal():
    coloured = RESNET.model_copy(update={"mean": [0.49, 0.48, 0.45]})
    with pytest.raises(UserError, match="whose channels must stay equal"):
        build_objective({"name": "colorization"}, Backbone(coloured), AugmentConfig(size=16))


def test_colorization_refuses_grey_images_and_names_inpainting():
    with pytest.raises(UserError, match="inpainting"):
        build_objective(
            {"name": "colorization"}, Backbone(RESNET.model_copy(update={"channels": 1})), AugmentConfig(size=16)
        )


def test_cells_are_hidden_as_a_whole_and_as_many_as_asked():
    hidden = cell_mask(keyed(50), 4, 0.25, 18)
    assert hidden.shape == (50, 1, 18, 18)
    cells = hidden[:, 0, 2::4, 2::4].float()
    assert cells.shape == (50, 4, 4) and (cells.sum(dim=(1, 2)) == 4).all()
    assert cells.mean(dim=0).min() > 0.05 and (hidden[:, :, 0] == hidden[:, :, 1]).all()


def test_inpainting_does_not_depend_on_what_is_hidden_but_its_loss_does():
    objective = build_objective({"name": "inpainting"}, Backbone(RESNET), AugmentConfig(size=16))
    images, random = torch.rand(4, 3, 16, 16), keyed(4)
    hidden = cell_mask(random, 4, 0.25, 16)
    seen = []
    objective.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    other = torch.where(hidden, torch.rand_like(images), images)
    losses = [objective(Batch({"view": x}, random, torch.arange(len(x))))["loss"] for x in (images, other)]
    assert torch.equal(*seen) and losses[0] != losses[1]


@pytest.mark.parametrize("shape", [(3, 16), (2, 49), (5, 196)])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_masking_is_lightlys(shape, ratio, monkeypatch):
    noise = torch.rand(shape)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.cat([noise[:, :1], noise], dim=1))
    kept, masked = lightly.random_token_mask((shape[0], shape[1] + 1), mask_ratio=ratio)  # with its class token
    ours = split_mask(noise, ratio)
    assert torch.equal(ours[0], kept[:, 1:] - 1) and torch.equal(ours[1], masked - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_targets_are_lightlys(channels):
    images = torch.rand(2, channels, 16, 16)
    objective = mae(channels=channels)
    expected = lightly.normalize_mean_var(lightly.patchify(objective.backbone.normalise(images), 4))
    torch.testing.assert_close(objective.targets(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(patchify(images, 4), lightly.patchify(images, 4))


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"pool": "avg", "class_token": False}])
def test_the_encoder_sees_visible_patches_only(kwargs):
    objective = mae(**kwargs).eval()
    images, random = torch.rand(3, 1, 16, 16), keyed(3)
    keep, masked = random_mask(random, 16, 0.75)
    assert keep.shape == (3, 4) and torch.equal(torch.cat([keep, masked], dim=1).sort().values[0], torch.arange(16))
    patches = torch.zeros(3, 16, dtype=torch.bool).scatter(1, masked, True).view(3, 1, 4, 4)
    hidden = patches.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    other = torch.where(hidden, torch.rand_like(images), images)
    tokens = objective.backbone.tokens(images, keep)
    assert tokens.shape == (3, objective.num_prefix + 4, 24)
    assert torch.equal(tokens, objective.backbone.tokens(other, keep))
    assert not torch.equal(tokens, objective.backbone.tokens(1 - images, keep))


def test_the_decoder_puts_every_patch_in_its_place():
    objective = mae().eval()
    keep, _ = random_mask(keyed(2), 16, 0.75)
    tokens = objective.backbone.tokens(torch.rand(2, 1, 16, 16), keep)
    shuffled = torch.tensor([2, 0, 3, 1])
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + shuffled])
    torch.testing.assert_close(objective.decode(tokens, keep), objective.decode(tokens[:, order], keep[:, shuffled]))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vits_feature_is_the_pool_of_its_tokens(pool):
    backbone = mae(pool).backbone.eval()
    images = torch.rand(2, 1, 16, 16)
    vit = backbone.vit
    with torch.no_grad():
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(backbone.normalise(images))))
        expected = {
            "token": lambda: backbone.tokens(images)[:, 0],
            "avg": lambda: vit.fc_norm(vit.blocks(tokens)[:, 1:].mean(dim=1)),
        }[pool]()
        torch.testing.assert_close(backbone(images), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_objective({"name": "mae"}, Backbone(RESNET), STILL), "in a ViT only"),
        (lambda: mae("map"), "attention pooling"),
        (lambda: mae(img_size=20), "do not tile the view"),
    ],
)
def test_backbones_that_mae_cannot_train_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
