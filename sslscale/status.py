"""`sslscale status`: what a run has done, does and has lost, from its files; another process may be at work on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslscale import storage
from sslscale.errors import UserError
from sslscale.lease import Lease
from sslscale.rundir import RunDir, read_json, read_lines

_RECENT = 20  # parts whose times give the rate


@dataclass(frozen=True)
class StageStatus:
    """One stage: `finished` of `total` (None: not known before the end) `unit`s, and how fast."""

    stage: str
    state: str
    """done, running, or stopped"""
    finished: int
    total: int | None
    unit: str
    per_second: float | None
    seconds_left: float | None
    failed: int
    checkpoint: str | None = None

    def line(self) -> str:
        of = "" if self.total is None else f"/{self.total:,}"
        parts = [f"{self.stage:<18} {self.state:<8} {self.finished:,}{of} {self.unit}"]
        if self.per_second is not None:
            parts.append(f"{self.per_second:,.3g}/s")
        if self.seconds_left is not None:
            parts.append(f"{self.seconds_left:,.0f} s left")
        if self.checkpoint is not None:
            parts.append(f"last checkpoint {self.checkpoint}")
        return ", ".join([*parts, f"{self.failed:,} failed"])


@dataclass(frozen=True)
class RunStatus:
    """`status` is running, done, failed, interrupted, or lost (its process is gone without a word)."""

    run: str
    status: str
    holder: str | None
    command: str | None
    stages: list[StageStatus]

    def lines(self) -> list[str]:
        held = f", held by {self.holder}" if self.holder else ""
        return [f"{self.run}: {self.status}{held}", *(stage.line() for stage in self.stages)]


def run_status(location: str) -> RunStatus:
    """The status of the run at a path or URL. UserError where there is none."""
    run = RunDir.reading(location)
    manifest = run.path / "manifest.json"
    if not manifest.is_file():
        raise UserError("there is no run here", got=location, fix="give the folder or URL that --run named")
    record, holder = read_json(manifest), Lease(run.path).holder()
    status = "lost" if record["status"] == "running" and holder is None else record["status"]
    stages = [_stage(run.path, path.parent, held=holder is not None) for path in _stages(run.path)]
    who = None if holder is None else f"pid {holder['pid']} on {holder['machine'].partition(' ')[0]}"
    return RunStatus(storage.shown(run.path), status, who, record.get("command"), stages)


def _stages(run: Path) -> Iterator[Path]:
    """stage.json of every stage, in the order in which they were begun."""
    found = [*run.glob("*/stage.json"), *run.glob("*/*/stage.json")]
    yield from sorted(found, key=lambda path: path.stat().st_mtime)


def _stage(run: Path, path: Path, held: bool) -> StageStatus:
    name, settings = path.relative_to(run).as_posix(), read_json(path / "stage.json")["settings"]
    done = (path / "result.json").is_file()
    lines = read_lines(path / "metrics.jsonl")
    if name == "pretrain":
        progress = _training(lines, settings)
    elif (path / "done").is_dir() and not lines:
        progress = _parts(path / "done")
    else:
        progress = {"finished": len(lines), "total": settings.get("max_iterations"), "unit": "iterations"}
    speed = {"per_second": None, "seconds_left": None} | progress
    if done:
        speed |= {"total": None, "seconds_left": None}
    listing = path / "checkpoints.json"
    return StageStatus(
        stage=name,
        state="done" if done else "running" if held else "stopped",
        failed=sum(len(file.read_text().splitlines()) for file in (path / "failed").glob("*.jsonl")),
        checkpoint=read_json(listing)["checkpoints"][-1]["name"] if listing.is_file() else None,
        **speed,
    )


def _training(lines: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    steps = [line for line in lines if "samples_per_second" in line]
    if not steps:
        return {"finished": 0, "total": None, "unit": "steps"}
    last = steps[-1]
    rate = last["samples_per_second"] / settings["global_batch"]
    left = last["total_steps"] - last["step"]
    return {
        "finished": last["step"],
        "total": last["total_steps"],
        "unit": "steps",
        "per_second": rate,
        "seconds_left": left / rate,
    }


def _parts(folder: Path) -> dict[str, Any]:
    """Finished parts; the rate is that of the last ones, while they still come."""
    times = sorted(path.stat().st_mtime for path in folder.iterdir())
    recent = times[-_RECENT:]
    span = time.time() - recent[0] if len(recent) > 1 else 0.0
    return {
        "finished": len(times),
        "total": None,
        "unit": "parts",
        "per_second": (len(recent) - 1) / span if span > 0 else None,
    }
