"""`kill -9` of the whole process tree, in the middle of pretraining and then of embedding; the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import small_run

# More steps and parts than the shared run, so that there is a middle to be killed in.
LONGER = [
    "pretrain.steps=30",
    "pretrain.checkpoint_every=3",
    "embed.part_rows=60",
    "embed.batch_size=60",
    "baselines=[]",
]
STAGES = ["index=null", "cluster=null", "anomaly=null", "report=null"]


def start(folder):
    """The command in a session of its own, as a user's shell would."""
    command = [sys.executable, "-m", "sslscale.cli", "run", *small_run(folder, *LONGER, *STAGES)]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        )


def kill_tree(process):
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=10)


def wait_for(process, condition, folder):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(0.02)


def finish(process, folder):
    assert process.wait(timeout=400) == 0, (folder / "log").read_text()[-2000:]


def features(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "run" / "embed" / "train").glob("part-*.npy"))}


def last_step(run: Path) -> int:
    path = run / "pretrain" / "checkpoints.json"
    return json.loads(path.read_text())["checkpoints"][-1]["state"]["step"] if path.is_file() else 0


@pytest.mark.ray
def test_a_run_killed_twice_ends_with_the_bytes_of_one_never_killed(tmp_path_factory):
    killed, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    finish(start(whole), whole)

    process = start(killed)
    wait_for(process, lambda: 6 <= last_step(killed / "run") < 30, killed)
    kill_tree(process)
    assert not (killed / "run" / "pretrain" / "result.json").exists()

    done = killed / "run" / "embed" / "train" / "done"
    process = start(killed)
    wait_for(process, lambda: done.is_dir() and len(list(done.glob("part-*"))) >= 2, killed)
    kill_tree(process)
    resumed = json.loads((killed / "run" / "pretrain" / "result.json").read_text())
    assert 6 <= resumed["resumed_at_step"] < 30 and resumed["steps"] == 30
    assert not (killed / "run" / "embed" / "train" / "features.json").exists()

    finish(start(killed), killed)
    ours, theirs = features(killed), features(whole)
    assert len(ours) == 30 and ours == theirs
    weights = "pretrain/backbone/backbone.safetensors"
    assert (killed / "run" / weights).read_bytes() == (whole / "run" / weights).read_bytes()
    lines = (killed / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == list(range(1, 31))
