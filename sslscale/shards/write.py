"""`pack`: a source's samples into tar shards, in parallel, byte-identical for the same input.

OUTPUT/<split>/<split>-00000.tar ...    the shards
OUTPUT/<split>/shards.json              what each holds, written when all are there
OUTPUT/pack.json                        what the whole is, written last
OUTPUT/.pack/                           its identity and a marker per finished shard: a second call continues
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from sslscale import storage
from sslscale.config.models import PackConfig
from sslscale.errors import UserError
from sslscale.rundir import RunDir, Stage, discard, hash_file, read_json, write_json
from sslscale.runtime.base import make_runtime
from sslscale.runtime.progress import Progress
from sslscale.shards.dataset import open_shards, write_index
from sslscale.shards.sources import Example, make_source

_CLEARED = "cleared"  # the part that comes before the shards


@dataclass(frozen=True)
class ShardJob:
    """The samples [start, stop) of a split, as one shard."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.tar"


def run_pack(config: PackConfig, *, overwrite: bool = False, part_of: RunDir | None = None) -> dict[str, Any]:
    """Packs the source and returns what pack.json holds: `identity, source, samples, skipped, splits`.

    `skipped` counts the files that the source passed over, by kind; a split has `samples, shards, bytes, fingerprint`.
    What an earlier call with the same settings and data finished is not done again. Raises UserError (exit 2) where
    a split has no samples, and where the output was packed with others, or holds files that pack did not write.
    """
    source = make_source(config.source, config.path, config.options)
    skipped = dict(getattr(source, "skipped", {}))
    _refuse_empty_splits(source.splits, skipped)
    _refuse_dotted_splits(source.splits)
    jobs = plan_shards(source.splits, config.samples_per_shard, config.limit)
    with RunDir(config.output, part_of) as run:
        settings = config.model_copy(update={"path": None}).identity()  # the data's hash says it, wherever it lies
        stage = run.open_stage(".pack", None, settings, {"source": source.fingerprint}, overwrite=overwrite)
        if not (stage.path / "done").is_dir():
            _clear(run.path, [*source.splits, *_packed_splits(run.path)], overwrite)
            stage.finish_part(_CLEARED, {})  # from here on, what lies in the place is this stage's own
        left = [job for job in jobs if not _is_there(run.path, job, stage.part_done(job.name))]
        if stage.done and not left:
            return read_json(run.path / "pack.json")
        if left:
            _write_all(config, run.path, stage, left)
        splits = {split: _finish_split(run.path / split, split, jobs, stage) for split in source.splits}
        result = {
            "source": config.source,
            "samples": sum(split["samples"] for split in splits.values()),
            "skipped": skipped,
            "splits": splits,
        }
        write_json(run.path / "pack.json", {"identity": stage.identity, **result})
        stage.finish(result)
        return read_json(run.path / "pack.json")


def plan_shards(splits: Mapping[str, int], samples_per_shard: int, limit: int | None) -> list[ShardJob]:
    """The shards of every split: `samples_per_shard` samples each, the last one fewer."""
    return [
        ShardJob(split, number, start, min(start + samples_per_shard, total))
        for split, length in splits.items()
        for total in [length if limit is None else min(limit, length)]
        for number, start in enumerate(range(0, total, samples_per_shard))
    ]


class ShardWriter:
    """A worker of the runtime: writes one shard an item."""

    def __init__(
        self, source: str, path: str | None, options: dict[str, Any], output: str, format: str, jpeg_quality: int
    ) -> None:
        self.source = make_source(source, path, options)
        self.output, self.format, self.jpeg_quality = Path(output), format, jpeg_quality

    def write(self, job: ShardJob, broadcast: None = None) -> dict[str, Any]:
        """Writes the shard under another name and renames it. Returns its record of shards.json."""
        shard = self.output / job.split / job.name
        shard.parent.mkdir(parents=True, exist_ok=True)
        partial = shard.with_name(f".{shard.name}.{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                with wds.TarWriter(file, encoder=False, mtime=0) as tar:  # a fixed time: the same bytes every time
                    for index in range(job.start, job.stop):
                        tar.write(self._sample(f"{job.split}-{index:06d}", self.source.example(job.split, index)))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(shard)
        finally:
            partial.unlink(missing_ok=True)
        size, samples, sha256 = shard.stat().st_size, job.stop - job.start, hash_file(shard)
        storage.move_out(shard)
        return {"name": job.name, "samples": samples, "bytes": size, "sha256": sha256}

    def _sample(self, key: str, example: Example) -> dict[str, Any]:
        if isinstance(example.data, bytes):
            sample: dict[str, Any] = {"__key__": key, example.extension: example.data}
        else:
            sample = {"__key__": key, self.format: self._encode(example.data)}
        if example.label is not None:
            sample["cls"] = str(example.label).encode()
        if example.metadata:
            sample["json"] = json.dumps(dict(example.metadata), sort_keys=True).encode()
        return sample

    def _encode(self, image: np.ndarray) -> bytes:
        data = io.BytesIO()
        if self.format == "png":
            Image.fromarray(image).save(data, "PNG")
        else:
            Image.fromarray(image).save(data, "JPEG", quality=self.jpeg_quality)
        return data.getvalue()


def _write_all(config: PackConfig, output: Path, stage: Stage, jobs: list[ShardJob]) -> None:
    setup = {
        "source": config.source,
        "path": config.path,
        "options": config.options,
        "output": str(output),
        "format": config.format,
        "jpeg_quality": config.jpeg_quality,
    }
    workers, total = min(config.workers, len(jobs)), sum(job.stop - job.start for job in jobs)
    with (
        make_runtime("local").pool(ShardWriter, setup, workers) as pool,
        Progress("pack", total, "samples") as progress,
    ):
        for index, record in pool.map("write", jobs):
            stage.finish_part(jobs[index].name, record)
            progress.advance(record["samples"])


def _finish_split(folder: Path, split: str, jobs: list[ShardJob], stage: Stage) -> dict[str, Any]:
    """Writes the split's shards.json from the shards' markers; returns its summary."""
    shards = [record for job in jobs if job.split == split and (record := stage.part_done(job.name))]
    write_index(folder, shards)
    for leftover in folder.glob(".*.tmp"):  # of a call that was killed
        leftover.unlink()
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "shards": len(shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "fingerprint": open_shards(storage.shown(folder)).fingerprint,
    }


def _refuse_dotted_splits(splits: Iterable[str]) -> None:
    """A sample's key begins with its split's name, and ends at the first dot."""
    dotted = [split for split in splits if "." in split or "/" in split]
    if dotted:
        raise UserError("the name of a split has no dot and no slash", got=", ".join(dotted), fix="rename it")


def _refuse_empty_splits(splits: Mapping[str, int], skipped: Mapping[str, int]) -> None:
    """An empty split is seldom meant (files of another format, a disk that is not mounted), and gives no shards."""
    empty = [split for split, samples in splits.items() if not samples]
    if empty or not splits:
        passed_over = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        raise UserError(
            "a split has no samples",
            got=(", ".join(empty) or "no splits") + (f" (skipped: {passed_over})" if passed_over else ""),
            fix="fill it, or take its file or folder out of pack.path",
        )


def _is_there(output: Path, job: ShardJob, record: Mapping[str, Any] | None) -> bool:
    return record is not None and storage.size(output / job.split / job.name) == record["bytes"]


def _packed_splits(output: Path) -> list[str]:
    return list(read_json(output / "pack.json")["splits"]) if (output / "pack.json").is_file() else []


def _clear(output: Path, splits: Iterable[str], overwrite: bool) -> None:
    """Empties the place of a new set of shards; what others put there only goes when the user says so."""
    for folder in sorted({output / split for split in splits}):
        if any(not name.startswith(".") for name in storage.names(folder)) and not overwrite:
            raise UserError(
                "the folder of a split holds other files",
                got=storage.shown(folder),
                fix="another pack.output, or --overwrite",
            )
        discard(folder)
    storage.remove(output / "pack.json")
