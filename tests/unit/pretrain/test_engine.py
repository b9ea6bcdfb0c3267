"""The engine's parts that need no rank beside this one."""

import math

import pytest
import torch
from torch import nn

from sslscale.config import AugmentConfig, BackboneConfig, OptimizerConfig, PretrainConfig
from sslscale.errors import UserError
from sslscale.models.image import Backbone
from sslscale.objectives import build_objective
from sslscale.pretrain.checkpoint import TrainState
from sslscale.pretrain.engine import accumulation, whole_batch
from sslscale.pretrain.optimizer import build_optimizer, learning_rate
from sslscale.shards.plan import Cursor


def test_the_schedule_warms_up_then_falls_along_a_cosine():
    config = OptimizerConfig(lr=1.0, warmup_share=0.1, final_lr=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.55) and rates[99] < 0.1003
    assert rates[30] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 20 / 90)))


def test_vectors_do_not_decay():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    decayed, spared = build_optimizer(module, OptimizerConfig(weight_decay=0.5)).param_groups
    assert [p.dim() for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.5
    assert len(spared["params"]) == 3 and spared["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_step_changes_neither_parameters_nor_moments(name):
    module = nn.Linear(3, 2)
    optimizer = build_optimizer(module, OptimizerConfig(name=name))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.skip = True
    before = module.weight.clone()
    module.weight.grad.fill_(float("nan"))
    optimizer.step()
    assert torch.equal(module.weight, before) and not optimizer.state
    optimizer.skip = False
    module.weight.grad.fill_(1.0)
    optimizer.step()
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize(
    ("world", "micro", "expected"),
    [(1, None, (64, 1)), (4, None, (16, 1)), (1, 20, (16, 4)), (2, 5, (4, 8)), (1, 1, (1, 64))],
)
def test_the_global_batch_stays_and_the_passes_follow(world, micro, expected):
    config = PretrainConfig(global_batch=64, micro_batch=micro)
    size, passes = accumulation(config, world, None)
    assert (size, passes) == expected and size * passes * world == 64


def test_batch_norm_needs_the_whole_batch():
    recipe = AugmentConfig(size=16)
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    objectives = [
        build_objective({"name": name}, Backbone(BackboneConfig(channels=1, **backbone)), recipe)
        for name, backbone in [
            ("rotation", {"architecture": "resnet18"}),
            ("rotation", {"architecture": "vit_tiny_patch16_224", "kwargs": vit}),
            ("simclr", {"architecture": "vit_tiny_patch16_224", "kwargs": vit}),
        ]
    ]
    config = PretrainConfig()
    reasons = [whole_batch(objective, config) for objective in objectives]
    assert "BatchNorm" in reasons[0] and reasons[1] is None and "compares" in reasons[2]
    assert whole_batch(objectives[0], PretrainConfig(batch_norm="stream")) is None
    objectives[0].backbone.freeze()
    assert whole_batch(objectives[0], config) is None


@pytest.mark.parametrize(("world", "micro", "expected"), [(1, None, (64, 1)), (1, 30, (16, 4)), (4, 20, (16, 1))])
def test_by_stream_a_pass_holds_whole_streams(world, micro, expected):
    config = PretrainConfig(global_batch=64, num_streams=8, num_workers=1, micro_batch=micro, batch_norm="stream")
    assert accumulation(config, world, None) == expected
    with pytest.raises(UserError, match="whole share"):
        accumulation(config.model_copy(update={"micro_batch": 7}), world, None)


def test_an_objective_that_needs_the_whole_batch_refuses_to_accumulate():
    with pytest.raises(UserError, match="cannot accumulate"):
        accumulation(PretrainConfig(global_batch=64, micro_batch=16), 1, "compares all samples")


def test_a_train_state_round_trips_through_json():
    state = TrainState(step=7, cursors={0: Cursor(1, 5), 3: Cursor(0, 9)}, samples=70, seconds=1.5)
    assert TrainState.from_json(state.to_json()) == state
