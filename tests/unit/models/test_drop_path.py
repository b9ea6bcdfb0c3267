"""Stochastic depth drops by sample: the same paths whoever computes them."""

from __future__ import annotations

import torch

from sslscale.config import BackboneConfig
from sslscale.models.drop_path import KeyedDropPath, draw_from
from sslscale.models.image import Backbone
from sslscale.views.keyed import KeyedRandom

VIT = BackboneConfig(
    architecture="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5},
    channels=1,
)


def random(start: int = 0, stop: int = 8, epoch: int = 0) -> KeyedRandom:
    ids = torch.arange(start, stop)
    return KeyedRandom.of(0, torch.full_like(ids, epoch), ids)


def features(backbone: Backbone, images: torch.Tensor, keys: KeyedRandom) -> torch.Tensor:
    draw_from(backbone, keys)
    return backbone(images)


def test_half_a_batch_drops_what_the_whole_one_drops():
    torch.manual_seed(0)
    backbone, images = Backbone(VIT).train(), torch.rand(2, 8, 1, 16, 16)  # two views of eight samples
    whole = features(backbone, images.flatten(0, 1), random()).unflatten(0, (2, 8))
    for start in (0, 4):
        part = slice(start, start + 4)
        ours = features(backbone, images[:, part].flatten(0, 1), random(start, start + 4)).unflatten(0, (2, 4))
        torch.testing.assert_close(ours, whole[:, part])
    assert not torch.allclose(features(backbone, images.flatten(0, 1), random(epoch=1)).unflatten(0, (2, 8)), whole)


def test_recomputed_blocks_drop_the_same_paths():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(VIT).train()
        if checkpointing:
            backbone.checkpoint_activations()
        features(backbone, torch.rand(8, 1, 16, 16), random()).square().sum().backward()
        gradients.append(backbone.vit.blocks[1].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_paths_are_dropped_at_their_rate_and_scaled():
    module = KeyedDropPath(0.25)
    module.name, module.random = "layer", random(0, 4000)
    dropped = module.train()(torch.ones(8000, 3))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(float((dropped[:, 0] == 0).float().mean()) - 0.25) < 0.02
    assert not torch.equal(dropped[:4000], dropped[4000:])  # each view has its own draws
    assert torch.equal(module.eval()(torch.ones(8000, 3)), torch.ones(8000, 3))
