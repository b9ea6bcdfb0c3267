"""What ranks compute on where GPUs are fewer than they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslscale.config import PretrainConfig, RunConfig
from sslscale.errors import UserError
from sslscale.pretrain import launch
from sslscale.pretrain.placement import rank_device


class Machines:
    """A runtime that sees so many GPUs."""

    name = "local"

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def device(self, name: str) -> str:
        return "cuda" if name == "cuda" or (name == "auto" and self.gpus) else "cpu"


def device(name: str, gpus: int, ranks: int | tuple[int, int], *, grows: bool) -> str:
    config = PretrainConfig(device=name, num_workers=ranks, num_streams=8, global_batch=8)
    return rank_device(config, Machines(gpus), lambda: gpus, grows=grows)


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize(
    ("name", "gpus", "ranks", "expected"),
    [
        ("auto", 0, 8, "cpu"),
        ("auto", 8, 8, "cuda"),
        ("auto", 4, (2, 8), "cuda"),  # it begins with fewer
        ("cpu", 4, 8, "cpu"),
        ("cuda", 8, 8, "cuda"),
    ],
)
def test_a_gpu_for_each_rank_or_none(name: str, gpus: int, ranks: int, expected: str, grows: bool) -> None:
    assert device(name, gpus, ranks, grows=grows) == expected


def test_gpus_of_a_cluster_do_not_stand_idle_unsaid() -> None:
    with pytest.raises(UserError) as error:
        device("auto", 7, 8, grows=True)
    assert "GPUs: 7, ranks: 8" in str(error.value)
    for way in ("pretrain.num_workers=4", "pretrain.device=cpu", "pretrain.device=cuda, which waits"):
        assert way in str(error.value)
    assert device("cuda", 7, 8, grows=True) == "cuda", "it waits for the eighth"


def test_this_machine_takes_its_cpus_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert device("auto", 1, 2, grows=False) == "cpu"
    assert "2 ranks train on the CPUs: GPUs here: 1 (pretrain.num_workers=1 takes GPUs)" in capsys.readouterr().err


def test_this_machine_never_has_more_gpus() -> None:
    with pytest.raises(UserError) as error:
        device("cuda", 2, 4, grows=False)
    assert "pretrain.num_workers=2" in str(error.value)
    assert "waits" not in str(error.value)


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cpu"), (2, "cuda")])
def test_ranks_are_told_what_was_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, expected: str
) -> None:
    """Else a rank that was placed on a CPU would take the GPU that it sees."""
    begun = []

    def until_done(self: launch.Restarts, settings: dict) -> dict:
        begun.append((settings["config"]["pretrain"]["device"], self.group.device, self.group.room()))
        return {"steps": 1}

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(launch.Restarts, "until_done", until_done)
    config = RunConfig(pretrain=PretrainConfig(num_workers=2))
    assert launch.launch(tmp_path, config, Machines(gpus), None, lambda: None) == {"steps": 1}
    assert begun == [(expected, expected, 2)]
    assert config.pretrain is not None and config.pretrain.device == "auto"
