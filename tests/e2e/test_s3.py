"""A whole run on an object store that fails: shards, run directory, checkpoints and features at s3:// URLs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import Outcome, small_run

from sslscale import storage
from sslscale.rundir import RunDir

if TYPE_CHECKING:
    from s3_server import FaultyProxy

FAULT_SECONDS = 30.0
LOCAL = ["--runtime", "local", "pretrain.num_workers=1", "runtime.workers=1", "pack.workers=1", "baselines=[]"]


def stages(cli: Callable[..., Outcome], arguments: list[str], *verbs: str) -> Outcome:
    for verb in verbs:
        outcome = cli(verb, *arguments, *LOCAL)
        assert outcome.code == 0, outcome.err
    return outcome


def another_machine() -> None:
    """Nothing of any run is on this machine any more."""
    shutil.rmtree(storage.local_path("s3://bucket"), ignore_errors=True)
    storage._known.clear()


def at(url: str) -> list[str]:
    return [
        *small_run(Path("unused"))[:2],
        *small_run(Path("unused"))[4:],
        "--run",
        f"{url}/run",
        f"pack.output={url}/data",
        f"datasets.train={url}/data/train",
        "storage.cache_gb=0.0001",  # less than all shards
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on local paths."""
    from sslscale.config import load_config
    from sslscale.pipeline import planned_stages, run_stages

    folder = tmp_path_factory.mktemp("local")
    arguments = small_run(folder)
    overrides = [argument for argument in [*arguments[4:], *LOCAL[2:]] if "=" in argument]
    config = load_config(arguments[1], [*overrides, f"run={folder / 'run'}", "runtime.name=local"])
    run_stages([stage for stage in planned_stages(config) if stage != "report"], config)
    return folder / "run"


def test_a_run_on_a_store_that_fails_loses_nothing(
    s3: str, s3_proxy: FaultyProxy, cli: Callable[..., Outcome], expected: Path
) -> None:
    s3_proxy.fail_until, s3_proxy.cuts = time.monotonic() + FAULT_SECONDS, 3
    failed, cut = s3_proxy.failed, s3_proxy.cut
    arguments = at(s3)
    stages(cli, arguments, "pack", "pretrain", "embed")
    another_machine()
    stages(cli, arguments, "index", "cluster", "anomaly")
    assert s3_proxy.failed > failed
    assert s3_proxy.cut > cut
    assert any(path.endswith(".tar") for path in s3_proxy.cut_paths)

    another_machine()
    run = storage.bring_tree(storage.local_path(f"{s3}/run"))
    results = {name: _json(run / name / "result.json") for name in ("pretrain", "embed/train", "cluster/main")}
    assert sum(result["storage_retries"] for result in results.values()) > 0
    embedded = results["embed/train"]
    assert embedded["samples_in"] == embedded["features_out"] == 1797
    assert embedded["failed"] == 0
    for file in sorted(expected.glob("embed/train/part-*")):
        assert (run / file.relative_to(expected)).read_bytes() == file.read_bytes(), file.name
    assert np.array_equal(np.load(run / "cluster/main/centroids.npy"), np.load(expected / "cluster/main/centroids.npy"))
    named = _json(run / "pretrain/checkpoints.json")["checkpoints"]
    there = {path.name for path in (run / "pretrain/checkpoints").iterdir()}
    assert there == {entry["name"] for entry in named}


def test_a_training_goes_on_elsewhere_from_the_last_named_checkpoint(
    s3: str, cli: Callable[..., Outcome], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine is lost while it uploads the second checkpoint: the store names the first one only."""
    from sslscale.pretrain.loop import Trainer

    arguments = at(s3)
    stages(cli, arguments, "pack")
    advance = Trainer._advance

    def lost(trainer: Any, *args: Any) -> None:
        advance(trainer, *args)
        if trainer.state.step == 9:
            trainer.checkpoints.settle()
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", lost)
        assert cli("pretrain", *arguments, *LOCAL, "pretrain.max_restarts=0").code == 1
    fs, root = storage.filesystem(f"{s3}/run/pretrain")
    listed = json.loads(fs.cat_file(f"{root}/checkpoints.json"))
    listed["checkpoints"] = listed["checkpoints"][:1]
    fs.pipe_file(f"{root}/checkpoints.json", json.dumps(listed).encode())
    another_machine()
    result = stages(cli, arguments, "pretrain").code
    assert result == 0
    run = storage.local_path(f"{s3}/run")
    assert _json(run / "pretrain/result.json")["resumed_at_step"] == 4
    weights = "pretrain/backbone/backbone.safetensors"
    assert (run / weights).read_bytes() == (expected / weights).read_bytes()


def test_sigterm_saves_and_ends_with_143(s3: str, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank asks the store at every step, also while the request is being written."""
    from sslscale.pretrain.loop import Trainer

    arguments = at(s3)
    stages(cli, arguments, "pack")
    monkeypatch.setattr(storage.appeared, "__defaults__", (0.0,))
    advance = Trainer._advance

    def terminated(trainer: Any, *args: Any) -> None:
        advance(trainer, *args)
        time.sleep(0.3)
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_advance", terminated)
    assert cli("pretrain", *arguments, *LOCAL).code == 143
    another_machine()
    run = RunDir(f"{s3}/run").pull()
    listed = _json(run.path / "pretrain/checkpoints.json")["checkpoints"]
    assert 2 < listed[-1]["state"]["step"] < 12


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
