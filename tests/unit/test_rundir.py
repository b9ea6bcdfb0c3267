from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from sslscale.errors import StageError, UserError
from sslscale.rundir import Metrics, RunDir, Stage, discard, flatten, hash_json, read_json, write_atomic, write_json

SETTINGS = {"k": 10, "objective": {"name": "simclr", "temperature": 0.3}}
PARENTS = {"features": "abc"}


def failures(stage: Stage) -> list[dict[str, Any]]:
    files = sorted((stage.path / "failed").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def stage(run: RunDir, **changes: Any) -> Stage:
    return run.open_stage("cluster", "main", {**SETTINGS, **changes}, PARENTS)


# ------------------------------------------------------------------ small files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "file.json"
    write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert not (tmp_path / "x.json").exists()


def test_reading_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "half.json")


def test_hashes_depend_on_values_not_on_order() -> None:
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.5})
    assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}


# ------------------------------------------------------------------ a stage


def test_a_stage_continues_and_ends_with_its_result(run: RunDir) -> None:
    first = stage(run)
    first.finish_part("part-00000", {"rows": 3}, [{"key": "a", "reason": "not an image"}])
    again = stage(run)
    assert not again.done
    assert again.part_done("part-00000") == {"rows": 3}
    assert again.part_done("part-00001") is None
    assert failures(again) == [{"key": "a", "reason": "not an image"}]
    result = again.finish({"iterations": 4})
    assert result == {"format_version": 1, "identity": first.identity, "iterations": 4, "storage_retries": 0}
    assert stage(run).done


def test_a_part_that_is_done_again_replaces_its_failures(run: RunDir) -> None:
    opened = stage(run)
    write_atomic(opened.path / "failed" / "part-00000.jsonl", '{"key": "a", "reason": "timeout"}\n')  # then killed
    opened.finish_part("part-00000", {"rows": 4})
    assert failures(opened) == []


def test_other_settings_are_refused_by_name(run: RunDir) -> None:
    stage(run)
    with pytest.raises(UserError) as refused:
        run.open_stage(
            "cluster", "main", {"k": 12, "objective": {"name": "simclr"}, "new": True}, {"features": "other"}
        )
    message = str(refused.value)
    assert refused.value.exit_code == 2
    for difference in (
        "k: 10 -> 12",
        "objective.temperature: 0.3 -> None",
        "new: None -> True",
        "features: 'abc' -> 'other'",
    ):
        assert difference in message
    assert "objective.name" not in message
    assert "--overwrite" in message
    assert "--name" in message


@pytest.mark.parametrize(
    ("kind", "name", "way", "no_way"),
    [
        ("index", "main", "another --name or --run keeps", "pack.output"),
        ("pretrain", None, "another --run keeps", "--name"),
        ("embed", "train", "another --run keeps", "--name"),
        ("projection", None, "another --run keeps", "--name"),
        (".pack", None, "another pack.output keeps", "--run"),
    ],
)
def test_the_advice_is_one_that_the_stage_can_follow(
    run: RunDir, kind: str, name: str | None, way: str, no_way: str
) -> None:
    run.open_stage(kind, name, {"a": 1}, {})
    with pytest.raises(UserError) as refused:
        run.open_stage(kind, name, {"a": 2}, {})
    assert way in str(refused.value) and no_way not in str(refused.value)


def test_a_stage_keeps_who_began_it_also_in_a_run_that_is_part_of_another(run: RunDir) -> None:
    run.on_start = lambda folder: {"command": "cluster"}
    inner = RunDir(run.path / "baselines" / "pixels", part_of=run)
    for holder in (run, inner):
        begun = holder.open_stage("cluster", "main", {}, {})
        assert read_json(begun.path / "stage.json")["command"] == "cluster"
        holder.on_start = lambda folder: {"command": "another"}
        assert read_json(holder.open_stage("cluster", "main", {}, {}).path / "stage.json")["command"] == "cluster"


def test_the_stages_and_answers_of_a_run(run: RunDir) -> None:
    assert run.stages() == [] and run.answers() == set()
    run.open_stage("cluster", "half", {}, {})
    run.open_stage("index", "whole", {}, {}).finish({})
    assert run.answers() == {"whole"}
    run.open_stage("pretrain", None, {}, {})
    RunDir(run.path / "baselines" / "hog").open_stage("embed", "train", {}, {})
    write_json(run.path / "cluster" / ".half.1.2.discarded" / "stage.json", {})
    assert run.answers() == {"main", "whole"}
    found = {path.relative_to(run.path).as_posix() for path in run.stages()}
    assert found == {"cluster/half", "index/whole", "pretrain", "baselines/hog/embed/train"}


def test_overwrite_replaces_and_a_name_keeps_both(run: RunDir) -> None:
    stage(run).finish({"iterations": 1})
    other = run.open_stage("cluster", "other", {"k": 12}, PARENTS)
    assert stage(run).done
    assert not other.done
    replaced = run.open_stage("cluster", "main", {"k": 12}, PARENTS, overwrite=True)
    assert not replaced.done
    assert sorted(path.name for path in replaced.path.parent.iterdir()) == ["main", "other"]
    assert [path.name for path in replaced.path.iterdir()] == ["stage.json"]


def test_overwrite_keeps_what_was_made_with_the_same_settings(run: RunDir) -> None:
    stage(run).finish({"iterations": 1})
    assert run.open_stage("cluster", "main", SETTINGS, PARENTS, overwrite=True).done


def test_a_folder_of_something_else_is_left_alone(run: RunDir) -> None:
    mine = run.path / "cluster" / "main" / "thesis.tex"
    write_atomic(mine, "years of work")
    with pytest.raises(UserError, match="something else than a stage"):
        stage(run)
    assert mine.read_text() == "years of work"
    assert run.open_stage("cluster", "main", SETTINGS, PARENTS, overwrite=True).path.is_dir()
    assert not mine.exists()


def test_a_start_that_was_killed_is_no_stage_yet(run: RunDir) -> None:
    write_atomic(run.path / "cluster" / "main" / ".stage.json.1.2.tmp", '{"iden')
    assert [path.name for path in stage(run).path.iterdir()] == ["stage.json"]


def test_discarding_also_clears_what_a_killed_process_had_renamed(tmp_path: Path) -> None:
    write_atomic(tmp_path / ".main.17.99.discarded" / "part", "x")
    write_atomic(tmp_path / ".other.17.99.discarded" / "part", "x")
    write_atomic(tmp_path / "main" / "part", "x")
    discard(tmp_path / "main")
    assert [path.name for path in tmp_path.iterdir()] == [".other.17.99.discarded"]


def test_the_share_of_failures(run: RunDir) -> None:
    opened = stage(run)
    opened.check_failed_share(1, 100, 0.01)
    opened.check_failed_share(0, 0, 0.0)
    with pytest.raises(StageError, match="too many samples failed") as error:
        opened.check_failed_share(2, 100, 0.01)
    assert "2 of 100" in str(error.value)


def test_a_metrics_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(3):
        metrics.append(step=step)
    with metrics.path.open("a") as file:
        file.write('{"step": 3, "lo')
    again = Metrics(metrics.path)
    assert [line["step"] for line in again.read()] == [0, 1, 2]
    again.keep(lambda line: line["step"] < 2)
    again.append(step=7)
    assert [line["step"] for line in again.read()] == [0, 1, 7]


def test_the_manifest_merges_one_level(run: RunDir) -> None:
    run.record(counts={"embed": 10}, status="running")
    run.record(counts={"index": 9}, status="done")
    assert read_json(run.path / "manifest.json") == {
        "format_version": 1,
        "counts": {"embed": 10, "index": 9},
        "status": "done",
    }


def test_a_reader_beside_the_writer_sees_each_whole_line_once(tmp_path):
    metrics, reader = Metrics(tmp_path / "metrics.jsonl"), Metrics(tmp_path / "metrics.jsonl")
    assert reader.read_new() == []
    metrics.append(step=1)
    with metrics.path.open("a") as file:
        file.write('{"step": 2')
    assert reader.read_new() == [{"step": 1}] and reader.read_new() == []
    with metrics.path.open("a") as file:
        file.write("}\n")
    assert reader.read_new() == [{"step": 2}]
    metrics.append(step=12)
    metrics.keep(lambda line: line["step"] != 2)
    metrics.append(step=13)  # so that what was read ends in the middle of a line
    assert reader.read_new() == [{"step": 1}, {"step": 12}, {"step": 13}] and reader.read_new() == []
    metrics.append(step=3)
    assert reader.read_new() == [{"step": 3}]


@pytest.mark.parametrize("error", [UserError, StageError])
def test_what_is_refused_before_it_has_made_anything_binds_no_other_settings(run: RunDir, error: type) -> None:
    with pytest.raises(error), run:
        stage(run)
        raise error("no such clusters")
    assert list(run.path.glob("*")) == [run.path / "cluster"]
    with run:
        assert not stage(run, k=11).done
        stage(run, k=11).finish({})
    with pytest.raises(error), run:  # it was there before
        stage(run, k=11)
        raise error("something else")
    assert stage(run, k=11).done


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_what_was_begun_stays(run: RunDir, error: type) -> None:
    with pytest.raises(error), run:
        begun = stage(run)
        if error is UserError:
            begun.finish_part("0", {})
        raise error("stop")
    with run, pytest.raises(UserError, match="other settings"):
        stage(run, k=11)
