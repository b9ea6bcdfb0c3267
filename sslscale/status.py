"""`sslscale status`: what a run has done, does and has lost, from its files; another process may be at work on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sslscale import storage
from sslscale.errors import UserError
from sslscale.lease import Lease
from sslscale.rundir import RunDir, read_json, read_lines

_RECENT = 20  # parts whose times give the rate


@dataclass(frozen=True)
class StageStatus:
    """One stage: `finished` of `total` (None: not known before the end) `unit`s, and how fast, while it runs.

    `unit` and `finished` are None for a stage that counts nothing on its way.
    """

    stage: str
    state: str
    """done, running, or stopped"""
    finished: int | None
    total: int | None
    unit: str | None
    per_second: float | None
    seconds_left: float | None
    failed: int
    checkpoint: str | None = None

    def line(self) -> str:
        of = "" if self.total is None else f"/{self.total:,}"
        counted = "" if self.finished is None else f" {self.finished:,}{of} {self.unit}"
        parts = [f"{self.stage:<18} {self.state:<8}{counted}".rstrip()]
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
    manifest, holder = run.path / "manifest.json", Lease(run.path).holder()
    if not manifest.is_file() and holder is None:
        raise UserError("there is no run here", got=location, fix="give the folder or URL that --run named")
    record = read_json(manifest) if manifest.is_file() else {}
    status = record.get("status", "running")  # it is held, and nothing has begun that would be recorded
    if status == "running" and holder is None:
        status = "lost"
    begun = sorted(run.stages(), key=lambda path: (path / "stage.json").stat().st_mtime)
    worked_on = [run.path / name for name in record.get("begun", ())] if "begun" in record else begun
    stages = [_stage(run.path, path, holder if path in worked_on else None) for path in begun]
    who = None if holder is None else f"pid {holder['pid']} on {holder['machine'].partition(' ')[0]}"
    return RunStatus(storage.shown(run.path), status, who, record.get("command"), stages)


def _run_of(run: Path, stage: Path) -> Path:
    """The run that a stage is of: `run`, or one inside it."""
    parts = stage.relative_to(run).parts
    return run.joinpath(*parts[: {"thumbnails": 1, "baselines": 2}.get(parts[0], 0)])


def _stage(run: Path, path: Path, holder: Mapping[str, Any] | None) -> StageStatus:
    done = (path / "result.json").is_file()
    running = holder is not None and not done
    since = holder.get("start", 0.0) if holder else 0.0
    count = _counted(_run_of(run, path), path, done, since)
    rate = count.per_second if running else None
    left = None
    if rate is not None and count.total is not None and count.finished is not None:
        left = (count.total - count.finished) / rate
    listing = path / "checkpoints.json"
    return StageStatus(
        stage=path.relative_to(run).as_posix(),
        state="done" if done else "running" if running else "stopped",
        finished=count.finished,
        total=None if done else count.total,
        unit=count.unit,
        per_second=rate,
        seconds_left=left,
        failed=sum(len(file.read_text().splitlines()) for file in (path / "failed").glob("*.jsonl")),
        checkpoint=read_json(listing)["checkpoints"][-1]["name"] if listing.is_file() else None,
    )


class _Count(NamedTuple):
    """How far a stage is; all None where nothing says so."""

    finished: int | None = None
    total: int | None = None
    unit: str | None = None
    per_second: float | None = None


def _counted(root: Path, path: Path, done: bool, since: float) -> _Count:
    """What the stage's files count; the rate is of what was finished after `since`, in seconds since the epoch."""
    kind, settings = path.relative_to(root).parts[0], read_json(path / "stage.json")["settings"]
    lines = read_lines(path / "metrics.jsonl")
    if kind == "pretrain":
        return _training(lines, settings)
    markers = list((path / "done").glob("[!.]*"))  # not those that are being written
    tried = [marker for marker in markers if marker.name.startswith("sweep-")]
    parts = [marker for marker in markers if marker not in tried]
    if lines and (done or not parts):  # clusters are fitted before rows are assigned
        return _Count(len(lines), settings["max_iterations"], "iterations")
    total = _total_parts(root, path, kind, settings)
    if parts or (total is not None and kind != "cluster"):
        return _Count(len(parts), total, "parts", _rate(parts, since))
    if tried:
        return _Count(len(tried), len(set(settings["num_clusters"])), "numbers of clusters", _rate(tried, since))
    return _Count()


def _training(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> _Count:
    steps = [line for line in lines if "samples_per_second" in line]
    if not steps:
        return _Count(0, None, "steps")
    last = steps[-1]
    return _Count(last["step"], last["total_steps"], "steps", last["samples_per_second"] / settings["global_batch"])


def _rate(markers: Sequence[Path], since: float) -> float | None:
    """Parts a second, of the last ones, while they still come; None before the second one."""
    recent = sorted(moment for marker in markers if (moment := marker.stat().st_mtime) >= since)[-_RECENT:]
    return (len(recent) - 1) / (time.time() - recent[0]) if len(recent) > 1 else None


def _total_parts(root: Path, path: Path, kind: str, settings: Mapping[str, Any]) -> int | None:
    """How many parts a stage will have, where what it reads says so."""
    corpus = path / "corpus.json"
    if kind == "embed" and corpus.is_file():
        generations = read_json(corpus)["generations"]
        return sum(-(-sum(shard[1] for shard in shards) // settings["part_rows"]) for shards in generations)
    if kind in ("cluster", "anomaly"):  # a part of the features each
        stores = [root / "embed" / dataset / "features.json" for dataset in settings["datasets"] or ["*"]]
        found = [file for store in stores for file in root.glob(store.relative_to(root).as_posix())]
        return sum(len(read_json(file)["parts"]) for file in found) or None
    return None
