from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sslscale import storage
from sslscale.cli import app
from sslscale.errors import UserError
from sslscale.rundir import Metrics, RunDir, write_json
from sslscale.status import run_status


def half_a_run(location: str | Path) -> RunDir:
    """A run of which embed is done, training is at step 30 of 90, and a part of the scores is there."""
    run = RunDir(location)
    run.record(status="running", command="run -c x.yaml")
    pretrain = run.open_stage("pretrain", None, {"global_batch": 50}, {})
    metrics = Metrics(pretrain.path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append(step=step, samples_per_second=100.0, total_steps=90)
    metrics.append(step=30, eval_rankme=4.0, total_steps=90)
    metrics.publish()
    write_json(pretrain.path / "checkpoints.json", {"checkpoints": [{"name": "step-00000020"}]})
    embed = run.open_stage("embed", "train", {}, {})
    embed.finish_part("part-00000", {"rows": 3}, [{"key": "a", "reason": "no image"}, {"key": "b", "reason": "cut"}])
    embed.finish({"features_out": 3})
    return run


def check(location: str, run: RunDir) -> None:
    with run:
        found = run_status(location)
        assert found.status == "running"
        assert found.holder is not None
    by_name = {stage.stage: stage for stage in found.stages}
    training, embed = by_name["pretrain"], by_name["embed/train"]
    assert (training.state, training.finished, training.total, training.failed) == ("running", 30, 90, 0)
    assert (training.per_second, training.seconds_left) == (2.0, 30.0)
    assert training.checkpoint == "step-00000020"
    assert (embed.state, embed.finished, embed.failed) == ("done", 1, 2)
    lost = run_status(location)
    assert lost.status == "lost"
    assert {stage.state for stage in lost.stages} == {"stopped", "done"}


def test_the_status_of_a_run_that_another_process_holds(tmp_path: Path) -> None:
    check(str(tmp_path), half_a_run(tmp_path))


def test_the_status_of_a_run_on_a_store(s3: str) -> None:
    run = half_a_run(f"{s3}/run")
    storage._known.clear()
    check(f"{s3}/run", run)


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        run_status(str(tmp_path / "none"))


def test_the_command(tmp_path: Path) -> None:
    half_a_run(tmp_path)
    told = CliRunner().invoke(app, ["status", str(tmp_path)]).stdout
    assert "30/90 steps, 2/s, 30 s left, last checkpoint step-00000020, 0 failed" in told
    assert "2 failed" in told
    as_json = CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).stdout
    assert json.loads(as_json)["stages"][0]["seconds_left"] == 30.0
