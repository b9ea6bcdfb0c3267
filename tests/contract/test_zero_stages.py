"""What is trained does not depend on the ZeRO stage or the number of ranks, with layer-wise norms and rates too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from objective_cases import GLOBAL_BATCH, batch, build, pretrain_config

from sslscale.config import OptimizerConfig
from sslscale.pretrain.engine import Engine

OPTIMIZERS = {
    "lars": OptimizerConfig(name="lars", lr=0.5, weight_decay=0.01, trust_coefficient=0.05, layer_decay=0.8),
    "adamw": OptimizerConfig(lr=1e-2, weight_decay=0.01, final_weight_decay=0.3, layer_decay=0.8),
}
STAGES = (0, 1, 2, 3)


def train(optimizer: str, zero_stage: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    objective = build("rotation")
    config = pretrain_config("rotation", zero_stage=zero_stage, optimizer=OPTIMIZERS[optimizer])
    engine = Engine(objective, config, 4, torch.device("cpu"))
    share = GLOBAL_BATCH // world_size
    for step in range(4):
        engine.step([batch(objective, rank * share, (rank + 1) * share, epoch=step)], step)
    return {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}


def train_on_a_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    trained = {(name, stage): train(name, stage, rank, world_size) for name in OPTIMIZERS for stage in STAGES}
    if rank == 0:
        torch.save(trained, Path(folder) / "trained.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    for world_size in (1, 2):
        (folder / str(world_size)).mkdir()
        mp.spawn(train_on_a_rank, args=(world_size, str(folder / str(world_size))), nprocs=world_size)
    return {world_size: torch.load(folder / str(world_size) / "trained.pt") for world_size in (1, 2)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_weights_at_every_stage(trained, optimizer, stage):
    expected = trained[1][optimizer, 0]
    start = build("rotation").state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in expected.items())
    assert moved > 1e-2
    for world_size in (1, 2):
        for name, value in trained[world_size][optimizer, stage].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3 * moved, msg=name)
