"""Backbones, their export, handcrafted features."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sslscale.config import BackboneConfig
from sslscale.errors import UserError
from sslscale.models.export import export_backbone, load_backbone, read_backbone_meta
from sslscale.models.handcrafted import HOG, Pixels
from sslscale.models.image import Backbone
from sslscale.models.load import find_embedder

SMALL = BackboneConfig(
    architecture="resnet18",
    kwargs={"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32], "stem_type": "deep", "stem_width": 4},
    stem="small",
    channels=1,
    mean=[0.3],
    std=[0.4],
)
VIT = BackboneConfig(architecture="vit_tiny_patch16_224", kwargs={"img_size": 16, "patch_size": 4, "depth": 2})
POOLED = VIT.model_copy(update={"kwargs": {**VIT.kwargs, "global_pool": "avg", "reg_tokens": 2}})


def export(config, folder, size=16):
    torch.manual_seed(0)
    backbone = Backbone(config).eval()
    sha = export_backbone(backbone, backbone.model.state_dict(), folder, size=size)
    return backbone, sha


@pytest.mark.parametrize("config", [SMALL, VIT, POOLED], ids=["resnet-small-stem", "vit", "vit-pooled"])
def test_an_export_loads_with_plain_timm_and_gives_the_same_features(config, tmp_path, monkeypatch):
    backbone, _ = export(config, tmp_path)
    images = torch.rand(3, config.channels, 16, 16)
    monkeypatch.chdir(tmp_path)
    meta = json.loads((tmp_path / "backbone.json").read_text())
    import safetensors.torch
    import timm

    names = {"timm": timm, "torch": torch, "safetensors": safetensors, "meta": meta}
    exec("\n".join(meta["load"]), names)
    assert len(meta["load"]) <= 4
    model = names["model"].eval()
    mean, std = (torch.tensor(meta[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model((images - mean) / std), backbone(images), rtol=1e-5, atol=1e-5)
        assert torch.equal(load_backbone(tmp_path)(images), backbone(images))
    assert meta["feature_dim"] == backbone.feature_dim == backbone(images).shape[1]


def test_other_weights_than_the_json_names_are_refused(tmp_path):
    export(SMALL, tmp_path)
    weights = tmp_path / "backbone.safetensors"
    assert load_file(str(weights))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"backbone\.json"):
        read_backbone_meta(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet8"}, "timm has no model 'resnet8'"),
        ({"kwargs": {"nonsense": 1}}, "refuses these arguments"),
        ({"architecture": "vit_tiny_patch16_224", "kwargs": {}}, "stem=small"),
        ({"mean": [0.1, 0.2]}, "one value, or one a channel"),
    ],
)
def test_a_backbone_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(UserError, match=message):
        Backbone(SMALL.model_copy(update=changes))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_map_of_a_network_is_in_the_layout_that_convolutions_are_fast_in(channels):
    backbone = Backbone(SMALL.model_copy(update={"channels": channels})).eval()
    layouts = {}
    for name, module in backbone.model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, y, name=name: layouts.update({name: y.stride(1)}))
    backbone(torch.rand(2, channels, 16, 16))
    assert layouts and set(layouts.values()) == {1}


def test_pixels_are_the_image():
    images = torch.rand(2, 3, 4, 4)
    pixels = Pixels(3, 4)
    assert torch.equal(pixels(images), images.reshape(2, 48)) and pixels.feature_dim == 48


def test_hog_is_scikit_images():
    from skimage.feature import hog

    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    ours = HOG(1, 28)
    expected = np.stack(
        [hog(image[0].numpy(), orientations=9, pixels_per_cell=(4, 4), cells_per_block=(2, 2)) for image in images]
    )
    assert ours.feature_dim == expected.shape[1]
    np.testing.assert_allclose(ours(images).numpy(), expected, atol=1e-4)


def test_an_unknown_backbone_is_refused_with_the_choices(tmp_path):
    with pytest.raises(UserError, match="did you mean 'pixels'"):
        find_embedder("pixel", tmp_path, channels=1, size=8)
    with pytest.raises(UserError, match="no exported backbone"):
        find_embedder("pretrain", tmp_path, channels=1, size=8)


@pytest.mark.parametrize("architecture", ["mobilenetv3_small_050", "lcnet_050", "resnet18", "convnext_atto"])
def test_features_are_as_wide_as_is_said(architecture):
    backbone = Backbone(BackboneConfig(architecture=architecture)).eval()
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, backbone.feature_dim)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("vit_tiny_patch16_224", "proj_drop_rate"), ("vit_tiny_patch16_224", "pos_drop_rate"), ("resnet18", "drop_rate")],
)
def test_dropout_that_would_draw_by_rank_is_refused(architecture, name):
    with pytest.raises(UserError, match=f"by rank.*\n.*kwargs.{name}=0.1"):
        Backbone(BackboneConfig(architecture=architecture, kwargs={name: 0.1}))


def test_a_models_own_dropout_is_off():
    backbone = Backbone(BackboneConfig(architecture="ghostnet_050")).train()
    assert backbone.model.drop_rate == 0.0  # 0.2 by default
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone(images))


def test_views_of_a_size_that_a_vit_does_not_take_are_refused():
    backbone, images = Backbone(VIT).eval(), torch.rand(2, 3, 32, 32)
    for compute in (backbone, backbone.tokens):
        with pytest.raises(UserError, match=r"32x32, vit_tiny_patch16_224\n.*16x16"):
            compute(images)
    dynamic = VIT.model_copy(update={"kwargs": {**VIT.kwargs, "dynamic_img_size": True}})
    assert Backbone(dynamic).eval()(images).shape == (2, 192)
