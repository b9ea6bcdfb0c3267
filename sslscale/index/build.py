"""`sslscale index`: a FAISS index over the features of a run; called again, it adds the parts that are new.

What it writes is in `sslscale.index.record`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.config import IndexConfig, RunConfig
from sslscale.errors import StageError, UserError
from sslscale.features import FeatureSet, open_features, sample_positions
from sslscale.features.files import replacing, write_npy
from sslscale.index.factory import can_merge, empty_index, train, use_gpus
from sslscale.index.measure import tuned
from sslscale.index.merge import merge_files, merge_rows
from sslscale.index.plan import IndexPlan, plan_index
from sslscale.index.record import IndexedPart, IndexRecord, carried, deletions, indexed_parts, located, write_parts
from sslscale.index.shard import BuildWorker, Group, prepared, shard_record, write_index
from sslscale.rundir import RunDir, Stage, discard, hash_json, read_json, write_json
from sslscale.runtime.base import Resources, Runtime, compute_threads
from sslscale.runtime.progress import Progress


def run_index(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Builds the index of `config.index.datasets`, or adds the parts that it lacks, and measures it.

    Returns result.json. UserError where parts that were indexed have changed since. A file that is missing or cut off
    is made again; what was deleted stays so, also by `overwrite`.
    """
    settings = config.index
    if settings is None:
        raise UserError("the config has no section 'index'", fix="add one, or leave this stage out")
    use_gpus(settings.device)
    features = open_features(run, settings.datasets)
    plan = plan_index(settings, features.num_rows, features.dim)
    identity = {**settings.identity(), "seed": config.seed, "threads": config.runtime.threads}
    parents = {"backbone": features.backbone}
    stage = _open(run, name, features, identity, parents, overwrite)
    builder = _Builder(stage, settings, config.seed, config.runtime.threads, config.runtime.workers, runtime, features)
    if not stage.done:
        plan.announce(features.num_rows, features.dim)
        return builder.fresh(plan)
    record = IndexRecord(stage.path, stage.result)
    record.numbers(features)
    if record.damaged() or not record.has_trained():
        run.on_start(stage.path)
        same = settings.model_copy(update={"factory": record.result["factory"]})
        record = IndexRecord(stage.path, builder.repaired(record, plan_index(same, features.num_rows, features.dim)))
    known = set(record.parts)
    new = [part for part in indexed_parts(features) if part not in known]
    if not new:
        return record.result
    run.on_start(stage.path)
    return builder.extended(record, new)


def _open(
    run: RunDir, name: str, features: FeatureSet, identity: dict[str, Any], parents: dict[str, str], overwrite: bool
) -> Stage:
    """The stage; one that is overwritten knows what was deleted before."""
    path = run.stage_path("index", name)
    if overwrite and (deleted := deletions(path)):
        write_json(carried(path), deleted)
    stage = run.open_stage("index", name, identity, parents, overwrite=overwrite)
    if overwrite and stage.done and set(IndexRecord(stage.path, stage.result).parts) - set(indexed_parts(features)):
        discard(stage.path)  # of features that were embedded again since
        stage = run.open_stage("index", name, identity, parents)
    if stage.done:
        storage.remove(carried(path))
    return stage


def compact_index(run: RunDir, runtime: Runtime, *, name: str = "main", workers: int = 1) -> dict[str, Any]:
    """Builds a finished index again without what was deleted from it; the same lists, no training. Returns result.json.

    The index is searched as it was until the new one is finished.
    """
    record = IndexRecord.open(run, name)
    known = read_json(record.path / "stage.json")
    settings = dict(known["settings"])
    seed, threads = settings.pop("seed"), settings.pop("threads")
    features = open_features(run, record.result["datasets"])
    record.numbers(features)
    if not record.has_trained():
        raise StageError(
            "a file of the index is missing or cut off",
            got=storage.shown(record.path / record.result["trained"]),
            fix=f"sslscale index -c CONFIG --run {storage.shown(run.path)} --name {name} builds it again",
        )
    if record.result["num_vectors"] == sum(shard.vectors for shard in record.shards):
        return record.result
    stage = Stage(record.path, "index", name, known["settings"], known["parents"])
    builder = _Builder(stage, IndexConfig(**settings), seed, threads, workers, runtime, features)
    return builder.compacted(record)


@dataclass
class _Builder:
    stage: Stage
    settings: IndexConfig
    seed: int
    threads: int
    workers: int
    runtime: Runtime
    features: FeatureSet
    started: float = field(default_factory=time.perf_counter)

    def fresh(self, plan: IndexPlan) -> dict[str, Any]:
        with compute_threads(self.threads):
            trained = self._train(plan)
        parts = indexed_parts(self.features)
        state = {
            "factory": plan.factory,
            "metric": self.settings.metric,
            "layout": self.settings.layout,
            "datasets": list(self.features.stores),
            "dim": self.features.dim,
            "bytes_planned": plan.bytes,
            "shard_rows": plan.shard_rows,
            "trained": trained,
            "state": 0,
            "deleted": self._deleted_before(parts),
        }
        return self._finish(state, parts, self._build(parts, parts, plan.shard_rows, trained), [])

    def extended(self, record: IndexRecord, new: Sequence[IndexedPart]) -> dict[str, Any]:
        """Adds parts to an index: in shards of their own, or, to a graph, in place of the whole."""
        result, parts = record.result, [*record.parts, *new]
        state = {**result, "datasets": list(self.features.stores), "state": result["state"] + 1}
        if result["layout"] == "sharded" or can_merge(empty_index(result["factory"], result["dim"])):
            added = self._build(parts, new, result["shard_rows"], result["trained"])
            return self._finish(state, parts, added, result["shards"])
        (whole,) = record.shards
        return self._finish(state, parts, self._build(parts, new, result["shard_rows"], whole.index, whole.rows), [])

    def compacted(self, record: IndexRecord) -> dict[str, Any]:
        """What is deleted stays listed: its rows are still in the parts that a later state is built from."""
        result, parts = record.result, record.parts
        shards = self._build(parts, parts, result["shard_rows"], result["trained"], left_out=record.deleted)
        return self._finish({**result, "state": result["state"] + 1}, parts, shards, [])

    def repaired(self, record: IndexRecord, plan: IndexPlan) -> dict[str, Any]:
        """The same index, in files made again; without what was deleted."""
        if not record.has_trained():
            storage.remove(self.stage.path / record.result["trained"])
            with compute_threads(self.threads):
                record = record.updated(trained=self._train(plan))
        return self.compacted(record)

    def _deleted_before(self, parts: Sequence[IndexedPart]) -> str | None:
        """The file of what was deleted from the index that this one is made in place of."""
        deleted, lost = located(deletions(self.stage.path), parts)
        if lost:
            print(
                f"index: {lost:,} deleted samples were embedded again since: delete their keys again if they are there",
                file=sys.stderr,
                flush=True,
            )
        if not len(deleted):
            return None
        write_npy(self.stage.path / (name := f"deleted-0-{len(deleted)}.npy"), deleted)
        return name

    def _train(self, plan: IndexPlan) -> str:
        """The file of the empty index that all shards start from; its name says what it was trained on."""
        name = f"trained-{hash_json([plan.factory, plan.train_rows, self.features.identity])}.faiss"
        path = self.stage.path / name
        if path.is_file():
            return name
        index = empty_index(plan.factory, self.features.dim)
        if not index.is_trained:
            at = sample_positions(self.features.num_rows, plan.train_rows, self.seed)
            rows = prepared(self.features.take(self.features.row_ids(at)), self.settings.metric)
            try:
                train(index, rows, self.settings.device)
            except RuntimeError as error:
                raise StageError(
                    "the index cannot be trained",
                    got=f"{plan.factory} on {len(rows)} rows: {str(error).strip().splitlines()[-1]}",
                    fix="set index.factory=auto, or raise index.train_rows",
                ) from error
        write_index(index, path)
        return name

    def _build(
        self,
        parts: Sequence[IndexedPart],
        wanted: Sequence[IndexedPart],
        shard_rows: int,
        base: str,
        base_rows: str | None = None,
        left_out: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Shards of the parts `wanted`, in order; those that an earlier call has finished are taken as they are."""
        number_of = {part: number for number, part in enumerate(parts)}
        present = {part: number for number, part in enumerate(indexed_parts(self.features))}
        groups = []
        for group in _grouped(wanted, shard_rows):
            pairs = [(number_of[part], present[part]) for part in group]
            numbers = [number for number, _ in pairs]
            out = np.empty(0, np.int64) if left_out is None else left_out[np.isin(left_out >> 32, numbers)]
            content = [base, numbers, [asdict(part) for part in group], out.tolist()]
            rows = sum(part.rows for part in group)
            groups.append(Group(f"shard-{hash_json(content)}", rows, pairs, out, base, base_rows))
        self._build_missing(groups)
        return [shard for group in groups if (shard := self._built(group)) is not None]

    def _build_missing(self, groups: Sequence[Group]) -> None:
        missing = [group for group in groups if self._built(group) is None]
        if not missing:
            return
        setup = {"folder": str(self.stage.path), "features": self.features.paths, "metric": self.settings.metric}
        workers = min(self.workers, len(missing))
        with (
            Progress("index", total=sum(group.rows for group in groups), unit="rows") as progress,
            self.runtime.pool(BuildWorker, setup, workers, Resources(threads=self.threads)) as pool,
        ):
            progress.start_at(sum(group.rows for group in groups if group not in missing))
            for index, shard in pool.map("build", missing):
                self.stage.finish_part(missing[index].name, shard)
                progress.advance(missing[index].rows)

    def _built(self, group: Group) -> dict[str, Any] | None:
        """The record of a shard that an earlier call has finished, and that is still there."""
        shard = self.stage.part_done(group.name)
        if shard is None or any(storage.size(self.stage.path / file) != size for file, size in shard["sizes"].items()):
            return None
        return shard

    def _finish(
        self,
        state: dict[str, Any],
        parts: Sequence[IndexedPart],
        added: list[dict[str, Any]],
        before: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Lays the shards out, measures, and names the new files in result.json, last."""
        suffix = f"-{state['state']}" if state["state"] else ""
        shards = [*before, *added]
        if state["layout"] != "sharded":
            shards = [self._merged(shards, state["trained"], suffix)]
        write_parts(self.stage.path / f"parts{suffix}.json", parts)
        seconds = time.perf_counter() - self.started
        record = IndexRecord(self.stage.path, {**state, "parts": f"parts{suffix}.json", "shards": shards})
        with compute_threads(self.threads):
            measured = tuned(record, self.features, self.settings, self.seed)
        sizes = [size for shard in record.shards for file, size in shard.sizes.items() if file == shard.index]
        gone = sum(part.rows for part in parts) - measured["num_vectors"]
        trained = storage.size(self.stage.path / state["trained"])
        values = {
            "trained_bytes": trained,
            "bytes": sum(sizes),
            "build_seconds": seconds,
            "num_deleted": gone,
            **measured,
        }
        result = self.stage.finish(record.updated(**values).result)
        IndexRecord(self.stage.path, result).remove_others()
        storage.remove(carried(self.stage.path))
        return result

    def _merged(self, shards: Sequence[dict[str, Any]], trained: str, suffix: str) -> dict[str, Any]:
        path = self.stage.path
        index, rows = f"index{suffix}.faiss", f"rows{suffix}.npy"
        vectors = sum(shard["vectors"] for shard in shards)
        merge_rows([path / shard["rows"] for shard in shards], vectors, path / rows)
        if len(shards) == 1:
            with replacing(path / index) as temporary:
                _link(storage.bring(path / shards[0]["index"]), temporary)
        else:
            merge_files(path / trained, [path / shard["index"] for shard in shards], path / index)
        return shard_record(path, vectors, index=index, rows=rows)


def _link(file: Path, other: Path) -> None:
    try:
        other.hardlink_to(file)
    except OSError:  # a file system without such links
        shutil.copyfile(file, other)


def _grouped(parts: Sequence[IndexedPart], shard_rows: int) -> list[list[IndexedPart]]:
    """Parts in order, in groups of at most `shard_rows` rows, or of a single part that has more."""
    groups: list[list[IndexedPart]] = []
    rows = 0
    for part in parts:
        if not groups or (rows and rows + part.rows > shard_rows):
            groups.append([])
            rows = 0
        groups[-1].append(part)
        rows += part.rows
    return groups
