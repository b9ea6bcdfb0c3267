"""Parameter groups, schedules, LARS."""

import lightly.utils.lars
import pytest
import torch
from torch import nn

from sslscale.config import BackboneConfig, OptimizerConfig
from sslscale.errors import UserError
from sslscale.models.image import Backbone
from sslscale.pretrain.optimizer import build_optimizer, set_schedules, weight_decay


class Model(nn.Module):
    def __init__(self, architecture, **kwargs):
        super().__init__()
        self.backbone = Backbone(BackboneConfig(architecture=architecture, kwargs=kwargs))
        self.head = nn.Linear(self.backbone.feature_dim, 4)


def scales(module, **settings):
    """Parameter name -> its group's factor of the learning rate."""
    groups = build_optimizer(module, OptimizerConfig(**settings)).param_groups
    of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in module.named_parameters()}


def test_lars_is_lightlys():
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(name="lars", lr=0.4, weight_decay=0.1, momentum=0.9, trust_coefficient=0.02)
    mine = build_optimizer(ours, config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    other = lightly.utils.lars.LARS(groups, lr=0.4, momentum=0.9, trust_coefficient=0.02)
    for _ in range(5):
        x = torch.randn(8, 6)
        for module, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_layer_that_decays_has_a_group_of_its_own_under_lars():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    groups = build_optimizer(module, OptimizerConfig(name="lars")).param_groups
    assert [(len(group["params"]), group["decays"]) for group in groups] == [(1, True), (1, True), (4, False)]


def test_weight_decay_goes_along_a_cosine_and_vectors_stay_without():
    config = OptimizerConfig(weight_decay=0.04, final_weight_decay=0.4)
    assert [weight_decay(config, step, 100) for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    optimizer = build_optimizer(nn.Sequential(nn.Linear(3, 2)), config)
    set_schedules(optimizer.param_groups, config, 50, 100)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0.0])


def test_layers_of_a_vit_learn_the_slower_the_deeper_they_lie():
    module = Model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=2, depth=2)
    found = scales(module, layer_decay=0.5)
    assert found["head.weight"] == found["head.bias"] == 1.0
    assert found["backbone.model.blocks.1.mlp.fc1.weight"] == 0.5 == found["backbone.model.blocks.1.norm1.bias"]
    assert found["backbone.model.blocks.0.mlp.fc1.weight"] == 0.25
    assert found["backbone.model.patch_embed.proj.weight"] == 0.125 == found["backbone.model.pos_embed"]
    assert set(scales(module).values()) == {1.0}


def test_layers_of_a_resnet_learn_the_slower_the_deeper_they_lie():
    module = Model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    config = OptimizerConfig(layer_decay=0.5, lr=1.0, warmup_share=0.0)
    optimizer = build_optimizer(module, config)
    assert set_schedules(optimizer.param_groups, config, 0, 10) == 1.0
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    model = module.backbone.model
    assert [rate[id(layer[0].conv1.weight)] for layer in (model.layer1, model.layer4)] == [0.0625, 0.5]
    assert rate[id(model.conv1.weight)] == rate[id(model.bn1.bias)] == 0.03125


def test_layers_that_timm_does_not_name_are_refused():
    module = Model("resnet18", layers=[1, 1, 1, 1])
    module.backbone.model = nn.Linear(3, 3)
    with pytest.raises(UserError, match="layer_decay"):
        build_optimizer(module, OptimizerConfig(layer_decay=0.5))
