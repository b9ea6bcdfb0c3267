"""Tables over several sittings: what is kept, tried again and left out, and that no run outlives its driver."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sittings import CODE, RunFailed, Runs, output_of, over_budget, recipe_hash, show_missing

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
KEY = {"dataset": "digits", "recipe": "simclr", "seed": 0}


def fails():
    raise RunFailed("exit 1: out of memory")


def test_a_failed_run_is_written_down_and_tried_again(tmp_path):
    file = tmp_path / "runs.jsonl"
    Runs(file).attempt(KEY, "a", fails)
    again = Runs(file)
    assert not again.done(KEY, "a") and again.measured({("digits", "simclr"): "a"}) == []
    assert again.missing([(KEY, "a")]) == [{**KEY, "failed": "exit 1: out of memory"}]
    again.attempt(KEY, "a", lambda: {"acc": 0.5})
    again.attempt(KEY, "a", fails)  # what is done is not run again
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["acc"] == 0.5 and "failed" not in line and line["commit"]
    again.attempt(KEY, "a", lambda: {"acc": 0.6}, again=True)
    assert [line["acc"] for line in Runs(file).lines] == [0.6]


def test_lines_of_another_recipe_stay_and_do_not_count(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    Runs(file).attempt(KEY, "old", lambda: {"acc": 0.1})
    runs = Runs(file)
    assert runs.measured({("digits", "simclr"): "new"}) == []
    assert "1 lines of other recipes" in capsys.readouterr().err
    assert runs.missing([(KEY, "new")]) == [{**KEY, "failed": None}]
    runs.attempt(KEY, "new", lambda: {"acc": 0.2})
    assert [line["acc"] for line in Runs(file).lines] == [0.1, 0.2]


def test_what_another_benchmark_writes_meanwhile_is_kept(tmp_path):
    file = tmp_path / "runs.jsonl"
    one, other = Runs(file), Runs(file)
    one.attempt(KEY, "a", lambda: {"acc": 0.1})
    other.attempt({**KEY, "seed": 1}, "a", lambda: {"acc": 0.2})
    assert [line["acc"] for line in Runs(file).lines] == [0.1, 0.2]


def test_a_line_cut_off_by_a_crash_is_dropped_and_nothing_else(tmp_path):
    file = tmp_path / "runs.jsonl"
    Runs(file).attempt(KEY, "a", lambda: {"acc": 0.1})
    file.write_text(file.read_text() + '{"dataset": "dig')
    assert [line["acc"] for line in Runs(file).lines] == [0.1]


def test_a_table_kept_in_memory_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Runs(None)
    runs.attempt(KEY, "a", lambda: {"acc": 0.1})
    assert runs.done(KEY, "a") and list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said(capsys):
    show_missing([{**KEY, "failed": "Traceback\nexit 1: why"}, {**KEY, "seed": 1, "failed": None}])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "MISSING dataset=digits recipe=simclr seed=0: exit 1: why"
    assert second.endswith("seed=1: not run yet")


def test_a_row_over_its_budget_is_flagged():
    assert over_budget(1.2) and not over_budget(1.05) and not over_budget(None)


def test_the_hash_is_of_recipe_base_code_and_more(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("a: 1")
    config = tmp_path / "own.yaml"
    config.write_text("base: base.yaml\nb: 1")
    first = recipe_hash(config)
    assert first == recipe_hash(config) != recipe_hash(config, "more")
    (tmp_path / "base.yaml").write_text("a: 2")
    second = recipe_hash(config)
    monkeypatch.setattr("sittings.CODE", CODE + 1)
    assert len({first, second, recipe_hash(config)}) == 3


def test_a_run_gives_its_output_or_the_tail_of_its_complaint():
    assert output_of([sys.executable, "-c", "print('done')"]) == "done"
    with pytest.raises(RunFailed, match="exit 3: told"):
        output_of([sys.executable, "-c", "import sys; print('told', file=sys.stderr); sys.exit(3)"])


DRIVER = """
import sys
from sittings import exit_on_sigterm, output_of
exit_on_sigterm()
told, child = sys.argv[1:]
output_of([sys.executable, "-c", child, told])
"""
CHILD = """
import os, pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + ".tmp").write_text(str(os.getpid()))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(60)
"""


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_saves_and_ends_with_its_driver(tmp_path, number):
    told = tmp_path / "told"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(told), CHILD], env=environment)
    try:
        until(told.exists)
        child = int(told.read_text())
        driver.send_signal(number)
        assert driver.wait(20) == (-number if number == signal.SIGKILL else 143)
        until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
        assert (tmp_path / "told.saved").exists()
    finally:
        driver.kill()
        driver.wait()
