"""A disk that fills up while a run trains on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from errno import ENOSPC
from pathlib import Path

import pytest
from conftest import ROOT, small_run

from sslscale.config import PackConfig
from sslscale.pretrain.checkpoint import Checkpoints
from sslscale.shards.write import run_pack

STEPS, SPARE_BYTES = 40, 64_000  # enough for a line in a log, too little for a checkpoint
SETTINGS = [
    *("runtime.name=local", "pretrain.epochs=null", f"pretrain.steps={STEPS}", "pretrain.global_batch=32"),
    *("pretrain.log_every=1", "pretrain.checkpoint_every=5", "pretrain.evaluate_samples=32", "pretrain.num_workers=2"),
    "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 16, 16, 32], stem_type: deep, stem_width: 4}",
]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a file system of its own needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def start(run: Path, data: Path) -> subprocess.Popen:
    config = str(ROOT / "configs" / "quickstart.yaml")
    command = [
        sys.executable,
        "-m",
        "sslscale.cli",
        "pretrain",
        "-c",
        config,
        "--run",
        str(run),
        f"datasets.train={data}",
    ]
    return subprocess.Popen([*command, *SETTINGS], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def checkpoints(run: Path) -> list[str]:
    listing = run / "pretrain" / "checkpoints.json"
    return [entry["name"] for entry in json.loads(listing.read_text())["checkpoints"]] if listing.is_file() else []


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - SPARE_BYTES)
    return ballast


def test_a_checkpoint_into_a_full_disk_says_so_and_the_last_one_is_good(small_disk, tmp_path):
    run_pack(PackConfig(source="digits", output=str(tmp_path), samples_per_shard=64, limit=200, workers=1))
    run = small_disk / "run"
    first = start(run, tmp_path / "train")
    while not checkpoints(run):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.005)
    ballast = fill(small_disk)
    _, error = first.communicate(timeout=240)
    assert first.returncode == 1, error
    lines = error[error.rindex("\nerror: ") + 1 :].splitlines()
    assert "a file could not be written" in lines[0] and "No space left on device" in lines[0]
    assert lines[1].startswith("  got:     0.") and "of 16.0 MiB are free" in lines[1] and str(run) in lines[1]
    assert "the last checkpoint, which is intact" in lines[2]

    kept = checkpoints(run)
    assert sorted(path.name for path in (run / "pretrain" / "checkpoints").iterdir()) == kept
    ballast.unlink()
    second = start(run, tmp_path / "train")
    _, error = second.communicate(timeout=240)
    assert second.returncode == 0, error
    result = json.loads((run / "pretrain" / "result.json").read_text())
    assert result["resumed_at_step"] == int(kept[-1].removeprefix("step-")) and result["steps"] == STEPS


def test_the_last_step_saved_again_never_takes_the_named_checkpoint_away(trained, tmp_path, cli, monkeypatch):
    """A rerun of a training that had saved its last step, but not written its result, and now meets a full disk."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run" / "pretrain", run / "pretrain")
    (run / "pretrain" / "result.json").unlink()
    arguments = ["pretrain", *small_run(trained), "--run", str(run), "--runtime", "local", "pretrain.num_workers=1"]
    before = checkpoints(run)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write", staticmethod(lambda engine, folder, size: OSError(ENOSPC, "no space")))
        assert cli(*arguments, "pretrain.max_restarts=0").code == 1
    assert checkpoints(run) == before and all((run / "pretrain/checkpoints" / name).is_dir() for name in before)
    assert cli(*arguments).code == 0
    after = json.loads((run / "pretrain" / "checkpoints.json").read_text())["checkpoints"]
    steps = [entry["state"]["step"] for entry in after]
    assert len(steps) == len(before) and len(set(steps)) == len(steps)
    assert {path.name for path in (run / "pretrain/checkpoints").iterdir()} == {entry["name"] for entry in after}
