"""`precision: auto` computes in bf16 where that is fast on every rank, and in fp32 elsewhere."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from objective_cases import GLOBAL_BATCH, batch, build, pretrain_config

from sslscale.pretrain import engine
from sslscale.runtime.device import multiplies_bf16

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_a_processor_is_asked_for_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bf16(CPU) is expected


def test_where_torch_cannot_tell_or_cannot_use_them_there_are_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bf16(CPU)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not multiplies_bf16(CPU)


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_what_the_device_is_fast_in(monkeypatch, one_rank, able):
    monkeypatch.setattr(engine, "multiplies_bf16", lambda device: able)
    objective = build("simclr")
    seen = []
    objective.backbone.register_forward_hook(
        lambda module, inputs, output: seen.append(torch.is_autocast_enabled("cpu"))
    )
    trained = engine.Engine(objective, pretrain_config("simclr", precision="auto"), 2, CPU)
    assert trained.precision == ("bf16" if able else "fp32")
    assert trained.step([batch(objective, 0, GLOBAL_BATCH)], 0).applied
    assert seen and all(enabled is able for enabled in seen)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_run_goes_on_where_there_is_no_bf16(monkeypatch, one_rank, tmp_path, zero_stage):
    def made(able):
        monkeypatch.setattr(engine, "multiplies_bf16", lambda device: able)
        config = pretrain_config("rotation", precision="auto", zero_stage=zero_stage)
        return engine.Engine(build("rotation"), config, 20, CPU)

    def losses(trained, steps):
        return [trained.step([batch(trained.objective, 0, GLOBAL_BATCH)], step).metrics["loss"] for step in steps]

    begun = made(True)
    first = losses(begun, range(15))[0]
    assert begun.save(tmp_path) is None
    expected = losses(begun, range(15, 20))
    gone_on = made(False)
    gone_on.load(tmp_path)
    assert gone_on.precision == "fp32" and begun.precision == "bf16"
    found = losses(gone_on, range(15, 20))
    assert found == pytest.approx(expected, rel=0.01)
    assert abs(found[0] - first) > 5 * abs(found[0] - expected[0])  # and not what an untrained network gives


def test_bf16_that_is_asked_for_is_kept_and_said_to_be_slow(monkeypatch, one_rank):
    monkeypatch.setattr(engine, "multiplies_bf16", lambda device: False)
    with pytest.warns(UserWarning, match="precision=auto"):
        assert engine.agreed_precision("bf16", CPU) == "bf16"
    monkeypatch.setattr(engine, "multiplies_bf16", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.agreed_precision("bf16", CPU) == "bf16"


def _on_a_rank(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for able in ((False, False), (True, False), (True, True)):
        engine.multiplies_bf16 = lambda device, able=able: able[rank]
        found.append(engine.agreed_precision("auto", CPU))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_one_rank_that_would_emulate_it_keeps_all_from_bf16(tmp_path):
    mp.spawn(_on_a_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["fp32", "fp32", "bf16"]
