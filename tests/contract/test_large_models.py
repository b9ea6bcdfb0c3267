"""ZeRO 3 with recomputed activations and an optimizer on the host: what is trained stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from objective_cases import RESNET, batch, build, pretrain_config

from sslscale.config import PretrainConfig
from sslscale.errors import UserError
from sslscale.models.image import Backbone
from sslscale.pretrain.engine import Engine

STEPS = 4


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start(name: str, checkpointing: bool = False, **settings: object) -> Engine:
    objective = build(name)
    if checkpointing:
        objective.backbone.checkpoint_activations()
    return Engine(objective, pretrain_config(name, **settings), 2 * STEPS, torch.device("cpu"))


def train(engine: Engine, steps: range) -> list[float]:
    return [engine.step([batch(engine.objective, 0, 32, epoch=step)], step).metrics["loss"] for step in steps]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloading_and_recomputing_change_no_loss(zero_stage):
    expected = train(start("mae"), range(STEPS))
    assert len(set(expected)) == STEPS
    ours = train(start("mae", True, zero_stage=zero_stage, offload_optimizer="cpu"), range(STEPS))
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_buckets_are_no_larger_than_what_is_trained(zero_stage):
    trained = sum(parameter.numel() for parameter in build("mae").parameters() if parameter.requires_grad)
    assert start("mae", zero_stage=zero_stage)._engine.optimizer.reduce_bucket_size == trained


def test_blocks_are_computed_again_in_the_backward_pass():
    calls: dict[bool, int] = {}
    for checkpointing in (False, True):
        engine = start("mae", checkpointing)
        counted: list[int] = []
        engine.objective.backbone.vit.blocks[0].attn.register_forward_hook(lambda *_: counted.append(1))  # noqa: B023
        train(engine, range(1))
        calls[checkpointing] = len(counted)
    assert calls == {False: 1, True: 2}


def test_an_offloaded_state_is_saved_and_loaded(tmp_path: Path):
    settings = {"zero_stage": 3, "offload_optimizer": "cpu"}
    first = start("mae", True, **settings)
    train(first, range(STEPS))
    assert first.save(tmp_path) is None
    expected = train(first, range(STEPS, 2 * STEPS))
    second = start("mae", True, **settings)
    second.load(tmp_path)
    assert train(second, range(STEPS, 2 * STEPS)) == expected


def test_batch_norm_is_not_recomputed():
    with pytest.raises(UserError, match="BatchNorm would count their statistics twice"):
        Backbone(RESNET).checkpoint_activations()


def test_there_is_nothing_to_offload_without_zero():
    with pytest.raises(ValueError, match="offload_optimizer needs zero_stage 1, 2 or 3"):
        PretrainConfig(zero_stage=0, offload_optimizer="cpu")


def test_the_search_for_a_loss_scale_is_no_divergence_and_what_it_found_is_saved(tmp_path: Path):
    def scaler(engine: Engine) -> torch.amp.GradScaler:
        return engine._scaler

    first = start("rotation", precision="fp16", zero_stage=0, max_bad_steps=2)
    scaler(first)._init_scale = 2.0**40  # gradients overflow in fp16 for many steps
    train(first, range(STEPS))
    assert first.bad_steps == STEPS and scaler(first).get_scale() < 2.0**40
    assert first.save(tmp_path) is None
    second = start("rotation", precision="fp16", zero_stage=0, max_bad_steps=2)
    second.load(tmp_path)
    assert scaler(second).get_scale() == scaler(first).get_scale()
