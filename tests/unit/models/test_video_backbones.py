"""Video backbones: what they make of the frames' order, their export, what objectives may be given."""

from __future__ import annotations

import json

import pytest
import torch

from sslscale.config import AugmentConfig, FramesConfig, TextConfig, VideoMAEConfig
from sslscale.errors import UserError
from sslscale.models.export import build_backbone, export_backbone, load_backbone
from sslscale.objectives import build_objective
from sslscale.views.keyed import KeyedRandom

RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MEAN = FramesConfig(kwargs=RESNET, stem="small", channels=1, frames=4)
GRU = MEAN.model_copy(update={"temporal": "gru"})
TUBELETS = VideoMAEConfig(kwargs={"patch_size": 8, **SMALL}, channels=1, frames=4, size=16)
WINDOW = MEAN.model_copy(update={"window": 3})
ALL = pytest.mark.parametrize("config", [MEAN, GRU, WINDOW, TUBELETS], ids=["mean", "gru", "window", "videomae"])


def build(config):
    torch.manual_seed(0)
    return build_backbone(config).eval()


def clips(count=3):
    return torch.rand(count, 4, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@ALL
@torch.no_grad()
def test_only_the_mean_over_frames_forgets_their_order(config):
    backbone, x = build(config), clips()
    backwards = (backbone(x) - backbone(x.flip(1))).abs().max()
    assert (backwards < 1e-5) == (config is MEAN)
    assert backbone.sequence(x).shape == (3, 2 if config in (TUBELETS, WINDOW) else 4, backbone.feature_dim)


@ALL
@torch.no_grad()
def test_an_export_loads_with_the_library_alone(config, tmp_path, monkeypatch):
    import safetensors.torch
    import timm
    import transformers

    backbone = build(config)
    export_backbone(backbone, backbone.model.state_dict(), tmp_path, size=16)
    monkeypatch.chdir(tmp_path)
    meta = json.loads((tmp_path / "backbone.json").read_text())
    names = {"timm": timm, "torch": torch, "transformers": transformers, "safetensors": safetensors, "meta": meta}
    exec("\n".join(meta["load"]), names)
    state = names["model"].state_dict()
    assert state.keys() == backbone.model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())
    assert torch.equal(load_backbone(tmp_path)(clips()), backbone(clips()))


@torch.no_grad()
def test_a_frame_backbones_features_are_those_of_its_frames():
    backbone, x = build(MEAN), clips()
    frames = torch.stack([backbone(x[:, t]) for t in range(4)])  # the timm model's own, (T, B, D)
    torch.testing.assert_close(backbone(x), frames.mean(dim=0))
    torch.testing.assert_close(backbone.sequence(x), frames.transpose(0, 1))
    torch.testing.assert_close(backbone.take(x, "layer:5"), frames.mean(dim=0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_sees_frames_in_a_row_as_channels():
    colour = WINDOW.model_copy(update={"channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    backbone, x = build(colour), clips().repeat(1, 1, 3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (colour.mean, colour.std))
    seen = [torch.cat([(x[:, t + w] - mean) / std for w in range(3)], dim=1) for t in range(2)]
    expected = torch.stack([backbone.model(one) for one in seen], dim=1)
    torch.testing.assert_close(backbone.sequence(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone(x), expected.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert backbone(x[:, 0]).shape == (3, backbone.feature_dim)
    with pytest.raises(UserError, match="longer than the clip"):
        build(WINDOW.model_copy(update={"window": 5}))


@torch.no_grad()
def test_a_window_of_a_vit_has_the_outputs_of_its_tokens():
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    backbone = build(
        WINDOW.model_copy(update={"architecture": "vit_tiny_patch16_224", "kwargs": vit, "stem": "default"})
    )
    assert backbone.take(clips(), "cls").shape == backbone.take(clips(), "tokens_mean").shape == (3, 24)
    torch.testing.assert_close(backbone.tokens(clips()[:, 0]), backbone.tokens(clips()[:, 0].repeat(1, 3, 1, 1)))


def test_image_objectives_are_given_one_frame_of_each_clip():
    backbone, x = build(MEAN), clips(64)
    objective = build_objective({"name": "simclr"}, backbone, AugmentConfig(size=16))
    random = KeyedRandom.of(0, torch.zeros(64, dtype=torch.int64), torch.arange(64))
    sampled = backbone.offer("images", x, random)
    which = (sampled[:, None] == x).flatten(2).all(dim=2)  # (B, T)
    assert (which.sum(dim=1) == 1).all() and which.any(dim=0).all()
    assert objective.make_views(x, random)["view_1"].shape == (64, 1, 16, 16)


@pytest.mark.parametrize(
    ("objective", "config"),
    [("rotation", TUBELETS), ("frame_order", TextConfig(kwargs=SMALL, vocab_size=300)), ("masked_lm", MEAN)],
)
def test_an_objective_that_does_not_fit_a_backbone_is_refused(objective, config):
    with pytest.raises(UserError, match="do not fit"):
        build_objective({"name": objective}, build_backbone(config), AugmentConfig(size=16))


def test_an_objective_of_images_would_leave_a_gru_untrained():
    with pytest.raises(UserError, match="leave the GRU untrained"):
        build_objective({"name": "simclr"}, build(GRU), AugmentConfig(size=16))


def test_tubelets_that_do_not_tile_the_clip_are_refused():
    with pytest.raises(UserError, match="do not tile"):
        build(TUBELETS.model_copy(update={"frames": 3}))
