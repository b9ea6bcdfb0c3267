"""Stopped on two ranks, continued on one or on two: the same samples, the same losses."""

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from resume_cases import CASES, STEPS, STOP_AT, losses, rewind, train_all

from sslscale.config import PackConfig
from sslscale.errors import StageError
from sslscale.shards.write import run_pack

NAMES = list(CASES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    run_pack(PackConfig(source="digits", output=str(folder), samples_per_shard=64, limit=200, workers=1))
    return folder / "train"


@pytest.fixture(scope="module")
def on_two_ranks(data, tmp_path_factory):
    """Every case, uninterrupted on two ranks; and again on two ranks from the first checkpoint."""
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    mp.spawn(train_all, args=(2, str(whole), str(data), NAMES), nprocs=2)
    for case in NAMES:
        rewind(whole / case, resumed / case)
    mp.spawn(train_all, args=(2, str(resumed), str(data), NAMES), nprocs=2)
    return whole, resumed


@pytest.fixture(scope="module")
def on_one_rank(on_two_ranks, data, tmp_path_factory):
    """Every case, from the first checkpoint of two ranks on one rank."""
    folder = tmp_path_factory.mktemp("shrunk")
    for case in NAMES:
        rewind(on_two_ranks[0] / case, folder / case)
    train_all(0, 1, str(folder), str(data), NAMES)
    return folder


@pytest.mark.parametrize("case", NAMES)
def test_the_same_number_of_ranks_goes_on_bit_for_bit(case, on_two_ranks):
    whole, resumed = on_two_ranks
    assert losses(resumed / case) == losses(whole / case)
    weights = "pretrain/backbone/backbone.safetensors"
    assert (resumed / case / weights).read_bytes() == (whole / case / weights).read_bytes()


@pytest.mark.parametrize("case", NAMES)
def test_another_number_of_ranks_goes_on_with_the_same_losses(case, on_two_ranks, on_one_rank):
    expected, ours = losses(on_two_ranks[0] / case), losses(on_one_rank / case)
    assert list(ours) == list(range(1, STEPS + 1))
    for step in range(STOP_AT + 1, STEPS + 1):
        assert ours[step] == pytest.approx(expected[step], rel=1e-5), step


def test_an_optimizer_that_cannot_be_resized_is_refused(data, on_two_ranks, tmp_path, monkeypatch):
    rewind(on_two_ranks[0] / "zero-1", tmp_path / "sgd")
    monkeypatch.setitem(CASES, "sgd", [*CASES["zero-1"], "pretrain.optimizer.name=sgd"])
    with pytest.raises(StageError, match="only AdamW"):
        train_all(0, 1, str(tmp_path), str(data), ["sgd"])
    dist.destroy_process_group()
