"""What ranks of one machine exchange through sockets is what torch.distributed gives."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sslscale.models import collectives

RANKS = 3


def _rank(rank: int, test: Any, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    test(rank)
    dist.destroy_process_group()


def _exchange(rank: int) -> None:
    collectives.connect_neighbours()
    generator = torch.Generator().manual_seed(rank)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for shape in ((), (1,), (5, 3), (0, 4), (1 << 15,)):
            own = (torch.randn(shape, generator=generator) * 9).to(dtype)
            assert collectives._neighbours_for(own) is not None
            everyone = [torch.empty_like(own) for _ in range(RANKS)]
            dist.all_gather(everyone, own)
            if shape:
                assert torch.equal(collectives.gather_rows(own), torch.cat(everyone))
            if dtype == torch.bool:
                continue
            total = own.clone()
            collectives.all_reduce(total)
            assert torch.equal(total, everyone[0] + everyone[1] + everyone[2])
            shown = [torch.empty_like(total) for _ in range(RANKS)]
            dist.all_gather(shown, total)
            assert all(torch.equal(one, total) for one in shown)
    columns = torch.arange(6.0).reshape(2, 3).t() + rank  # not contiguous
    assert torch.equal(collectives.gather_rows(columns)[2 * 3 :], torch.arange(6.0).reshape(2, 3).t() + 2)
    large = torch.full((1 << 18,), float(rank))
    assert collectives._neighbours_for(large) is None
    collectives.all_reduce(large)
    assert torch.equal(large, torch.full_like(large, 3.0))


def _lose_one(rank: int) -> None:
    collectives.connect_neighbours()
    if rank == 1:
        os._exit(0)
    with pytest.raises((ConnectionError, BrokenPipeError)):
        for _ in range(2):  # rank 2 has no socket to rank 1: it learns of the loss when rank 0 has ended
            collectives.all_reduce(torch.ones(4))
    os._exit(0)


def _one_cannot_reach(rank: int) -> None:
    if rank == 0:
        tempfile.TemporaryDirectory = _refuse  # type: ignore[assignment, misc]
    with pytest.warns(UserWarning, match="no /tmp") if rank == 0 else contextlib.nullcontext():
        collectives.connect_neighbours()
    assert collectives._neighbours is None
    total = torch.tensor(float(rank))
    collectives.all_reduce(total)
    assert total == 3.0


def _refuse(**_: Any) -> Any:
    raise PermissionError("/tmp is not to be written")


def _of_several_machines(rank: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    collectives.connect_neighbours()
    assert collectives._neighbours is None


@pytest.mark.parametrize("test", [_exchange, _lose_one, _one_cannot_reach, _of_several_machines])
def test_neighbours(test: Any, tmp_path: Path) -> None:
    before = set(Path("/tmp").iterdir())
    mp.start_processes(_rank, (test, str(tmp_path)), nprocs=RANKS, start_method="fork")
    assert not [path for path in set(Path("/tmp").iterdir()) - before if (path / "ranks").exists()]
