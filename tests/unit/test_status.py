from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sslscale import storage
from sslscale.cli import app
from sslscale.errors import UserError
from sslscale.rundir import Metrics, RunDir, write_json
from sslscale.status import StageStatus, run_status


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
    assert {(stage.per_second, stage.seconds_left) for stage in lost.stages} == {(None, None)}


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
    with half_a_run(tmp_path):
        told = CliRunner().invoke(app, ["status", str(tmp_path)]).stdout
        as_json = CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).stdout
    assert "30/90 steps, 2/s, 30 s left, last checkpoint step-00000020, 0 failed" in told
    assert "2 failed" in told
    assert json.loads(as_json)["stages"][0]["seconds_left"] == 30.0
    stopped = CliRunner().invoke(app, ["status", str(tmp_path)]).stdout
    assert "30/90 steps, last checkpoint step-00000020, 0 failed" in stopped


def only_stage(run: RunDir) -> StageStatus:
    (stage,) = run_status(str(run.path)).stages
    return stage


def parts_of(run: RunDir, kind: str, settings: Mapping[str, object], ages: Mapping[str, float]) -> Path:
    """A stage of `run` whose parts were finished so many seconds ago."""
    stage = run.open_stage(kind, "main", settings, {})
    for part, age in ages.items():
        stage.finish_part(part, {})
        os.utime(stage.path / "done" / part, times=(time.time() - age,) * 2)
    return stage.path


def test_the_time_left_of_parts_is_at_the_rate_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.time() - 25
    monkeypatch.setattr("sslscale.lease._start_time", lambda pid: begun)
    with RunDir(tmp_path) as run:
        ages = {"part-00000": 86_400.0, "part-00001": 20.0, "part-00002": 10.0}
        embed = parts_of(run, "embed", {"part_rows": 100}, ages)
        generations = [[["a.tar", 250, 0, ""], ["b.tar", 51, 0, ""]], [["c.tar", 1, 0, ""]]]
        write_json(embed / "corpus.json", {"generations": generations})
        found = only_stage(run)
        assert (found.finished, found.total, found.unit) == (3, 5, "parts")
        assert found.per_second == pytest.approx(1 / 20, rel=0.1), "of the two that this process has finished"
        assert found.seconds_left == pytest.approx(40, rel=0.1)
        write_json(embed / "result.json", {})
        assert (only_stage(run).per_second, only_stage(run).seconds_left) == (None, None)


def test_before_the_first_part_the_number_to_come_is_shown(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        embed = parts_of(run, "embed", {"part_rows": 100}, {})
        write_json(embed / "corpus.json", {"generations": [[["a.tar", 250, 0, ""]]]})
        assert "running  0/3 parts, 0 failed" in only_stage(run).line()


@pytest.mark.parametrize(("datasets", "total"), [(None, 5), (["test"], 2)])
def test_scores_have_the_parts_of_the_features(tmp_path: Path, datasets: list[str] | None, total: int) -> None:
    for dataset, parts in (("train", 3), ("test", 2)):
        write_json(tmp_path / "embed" / dataset / "features.json", {"parts": [{}] * parts})
    with RunDir(tmp_path) as run:
        parts_of(run, "anomaly", {"datasets": datasets}, {"0": 1.0})
        assert (only_stage(run).finished, only_stage(run).total) == (1, total)


def test_clusters_are_tried_then_fitted_then_assigned(tmp_path: Path) -> None:
    write_json(tmp_path / "embed" / "train" / "features.json", {"parts": [{}] * 3})
    settings = {"datasets": None, "num_clusters": [5, 10, 20], "max_iterations": 50}
    with RunDir(tmp_path) as run:
        begun = parts_of(run, "cluster", settings, {})
        assert only_stage(run).unit is None
        stage = run.open_stage("cluster", "main", settings, {})
        stage.finish_part("sweep-5", {})
        assert "1/3 numbers of clusters" in only_stage(run).line()
        metrics = Metrics(begun / "metrics.jsonl")
        metrics.append(iteration=1)
        assert "1/50 iterations" in only_stage(run).line()
        stage.finish_part("0", {})
        assert "1/3 parts" in only_stage(run).line()
        stage.finish({})
        assert "done     1 iterations, 0 failed" in only_stage(run).line()


def test_a_stage_that_counts_nothing_has_no_unit(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.open_stage("reduce", "main", {"rows": 9}, {})
        assert only_stage(run).line().split() == ["reduce/main", "running,", "0", "failed"]
        assert (only_stage(run).finished, only_stage(run).unit) == (None, None)


def test_the_runs_in_a_run_are_listed(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.open_stage("dedup", "main", {}, {})
        for inner, kind in (("thumbnails", "embed"), ("baselines/pixels", "cluster")):
            RunDir(tmp_path / inner).open_stage(kind, "main", {"datasets": None, "part_rows": 9}, {})
        discarded = tmp_path / "embed" / ".train.1.2.discarded"
        write_json(discarded / "stage.json", {"settings": {}})
        names = [stage.stage for stage in run_status(str(tmp_path)).stages]
    assert sorted(names) == ["baselines/pixels/cluster/main", "dedup/main", "thumbnails/embed/main"]


def test_a_run_that_has_recorded_no_status_yet(tmp_path: Path) -> None:
    """As in the moment before its first stage."""
    with RunDir(tmp_path) as run:
        assert run_status(str(tmp_path)).status == "running"
        run.record(counts={"pack": None})
        assert run_status(str(tmp_path)).status == "running"
    assert run_status(str(tmp_path)).status == "lost"


def test_what_an_earlier_command_left_is_not_running(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open_stage("anomaly", "main", {"datasets": None}, {})
    run.open_stage("reduce", "main", {}, {})
    run.record(status="running", begun=["reduce/main"])
    with run:
        states = {stage.stage: stage.state for stage in run_status(str(tmp_path)).stages}
    assert states == {"anomaly/main": "stopped", "reduce/main": "running"}
