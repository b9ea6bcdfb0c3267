"""`sslscale dedup`: which samples of a run's datasets are duplicates, as a table and as shards without them.

dedup/<name>/duplicates.parquet   dataset, key, shard, record, group, kind (kept, exact, near), one row a member
dedup/<name>/<dataset>.json       the dataset without them: a filtered list of shards, for `datasets:`
thumbnails/                       a run of its own inside this one: the small images, and their neighbours
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sslscale import storage
from sslscale.config import DedupConfig, EmbedConfig, RunConfig
from sslscale.dedup.compare import same_picture
from sslscale.dedup.pairs import content_hashes, exact_pairs, groups_of, near_pairs
from sslscale.embed.corpus import Corpus
from sslscale.embed.stage import run_embed
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.features.files import replacing
from sslscale.index.all_pairs import all_pairs
from sslscale.pretrain.stage import dataset_shards
from sslscale.rundir import RunDir, Stage, read_json
from sslscale.runtime.base import Resources, Runtime
from sslscale.runtime.progress import Progress
from sslscale.shards.dataset import ShardSet, write_filtered
from sslscale.shards.decode import DecodeError, image_bytes

PAIRS_PER_TASK = 256
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # as PIL says it

Place = tuple[str, int, int]  # dataset, shard, record


def run_dedup(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Finds the duplicates of `config.dedup.datasets`; returns result.json.

    Samples with the same bytes are exact duplicates. Near ones are pairs of the kNN graph that stand out from their
    neighbourhood and are one picture by `same_picture`; or, with `dedup.threshold`, those that are as similar as that.
    Connected samples are a group, of which the first is kept.
    """
    settings = config.dedup or DedupConfig()
    names = settings.datasets or list(config.datasets)
    shards = {dataset: dataset_shards(run, config, dataset) for dataset in names}
    if not shards:
        raise UserError("the config names no datasets", fix="add datasets.NAME=SHARDS")
    if settings.features == "embedded":
        features = open_features(run, names)
        _check_shards(run, shards)
        stage = _open(run, config, settings, name, features, overwrite)
        return stage.result if stage.done else _find(run, config, settings, runtime, stage, shards, name, overwrite)
    with RunDir(run.path / "thumbnails", part_of=run) as inner:
        thumbnails = EmbedConfig(
            datasets=names, backbone="pixels", size=settings.size, channels=1, normalize=False, max_failed_share=1.0
        )
        small = config.model_copy(update={"embed": thumbnails, "pretrain": None})
        run_embed(inner, small, runtime, overwrite=overwrite)
        thumbs = open_features(inner, names)
        if not thumbs.num_rows:
            raise UserError(
                "no sample can be read as an image",
                got=f"the reasons are in {storage.shown(inner.path)}/embed/*/failed",
                fix="embed texts and clips, and set dedup.features=embedded with a dedup.threshold",
            )
        stage = _open(run, config, settings, name, thumbs, overwrite)
        return stage.result if stage.done else _find(inner, config, settings, runtime, stage, shards, name, overwrite)


def _check_shards(run: RunDir, shards: Mapping[str, ShardSet]) -> None:
    """UserError where features were made from other shards than those that pictures would be read from."""
    for dataset, own in shards.items():
        folder = run.stage_path("embed", dataset)
        if read_json(folder / "result.json")["corpus"] != Corpus.of(own, folder).fingerprint:
            raise UserError(
                f"the features of {dataset!r} are of other shards than the config names",
                got=own.fingerprint,
                fix="name the shards that were embedded, or embed these first",
            )


def _open(
    run: RunDir, config: RunConfig, settings: DedupConfig, name: str, features: FeatureSet, overwrite: bool
) -> Stage:
    own = {**settings.identity(), "threads": config.runtime.threads, "seed": config.seed}
    return run.open_stage("dedup", name, own, {"features": features.identity}, overwrite=overwrite)


def _find(
    holder: RunDir,
    config: RunConfig,
    settings: DedupConfig,
    runtime: Runtime,
    stage: Stage,
    shards: Mapping[str, ShardSet],
    name: str,
    overwrite: bool,
) -> dict[str, Any]:
    features = open_features(holder, list(shards))
    embedded = [read_json(holder.stage_path("embed", dataset) / "result.json") for dataset in shards]
    exact = exact_pairs(content_hashes(features))
    k = min(settings.k, features.num_rows - 1)
    near = candidates = np.zeros((0, 2), np.int64)
    unread = 0
    if k:
        found = all_pairs(
            holder, config, runtime, features, k=k, metric="cosine", wanted_recall=settings.wanted_recall,
            name=f"dedup-{name}", overwrite=overwrite,
        )  # fmt: skip
        candidates, stands_out = near_pairs(found, settings.threshold)
        near = candidates
        if settings.threshold is None:
            same = _compare(config, runtime, features, shards, candidates, stands_out)
            near, unread = candidates[[one is True for one in same]], same.count(None)
    first = groups_of(np.concatenate([exact, near]), features.num_rows)
    table = _table(features, first, exact)
    with replacing(stage.path / "duplicates.parquet") as temporary:
        pq.write_table(table, temporary)
    kinds = table.column("kind").to_numpy(zero_copy_only=False)
    excluded = table.filter(pa.array(kinds != "kept"))
    for dataset, own in shards.items():
        _write_list(stage.path / f"{dataset}.json", dataset, own, excluded)
    counts = {kind: int((kinds == kind).sum()) for kind in ("exact", "near")}
    return stage.finish(
        {
            "num_samples": features.num_rows,
            "failed": sum(result["failed"] for result in embedded),
            "kept": features.num_rows - sum(counts.values()),
            **counts,
            "groups": int((kinds == "kept").sum()),
            "candidate_pairs": len(candidates),
            "near_pairs": len(near),
            "unread_pairs": unread,
            "lists": {dataset: storage.shown(stage.path / f"{dataset}.json") for dataset in shards},
        }
    )


def _compare(
    config: RunConfig,
    runtime: Runtime,
    features: FeatureSet,
    shards: Mapping[str, ShardSet],
    pairs: np.ndarray,
    stands_out: np.ndarray,
) -> list[bool | None]:
    """Whether each pair of positions shows one picture; None where one of the two cannot be read to compare."""
    unique, where = np.unique(pairs, return_inverse=True)
    places = _places(features, shards, unique)
    listed = [
        (places[a], places[b], bool(out)) for (a, b), out in zip(where.reshape(-1, 2).tolist(), stands_out, strict=True)
    ]
    tasks = [listed[start : start + PAIRS_PER_TASK] for start in range(0, len(listed), PAIRS_PER_TASK)]
    workers = min(config.runtime.workers, max(1, len(tasks)))
    same: dict[int, list[bool | None]] = {}
    with (
        Progress("dedup", total=len(pairs), unit="pairs") as progress,
        runtime.pool(
            CompareWorker, {"shards": dict(shards)}, workers, Resources(threads=config.runtime.threads)
        ) as pool,
    ):
        for index, answer in pool.map("compare", tasks):
            same[index] = answer
            progress.advance(len(answer))
    return [one for index in range(len(tasks)) for one in same[index]]


class CompareWorker:
    """Reads pairs of samples from their shards and compares them as pictures."""

    def __init__(self, shards: Mapping[str, ShardSet]) -> None:
        self.shards = shards

    def compare(self, pairs: Sequence[tuple[Place, Place, bool]], broadcast: None = None) -> list[bool | None]:
        shard = cache(lambda name, number: self.shards[name].open(number))  # open until the task is done
        same = []
        for *places, stands_out in pairs:
            first, second = (_image(shard(name, number).read(record)) for name, number, record in places)
            same.append(self._same(first, second, stands_out))
        return same

    def _same(self, first: bytes | None, second: bytes | None, stands_out: bool) -> bool | None:
        if first is None or second is None:
            return None
        try:
            return same_picture(first, second, stands_out=stands_out)
        except UNREADABLE:  # what torchvision could read and PIL cannot: counted
            return None


def _image(sample: dict[str, Any]) -> bytes | None:
    """Its bytes; None of a text or a clip."""
    try:
        return image_bytes(sample)
    except DecodeError:
        return None


def _places(features: FeatureSet, shards: Mapping[str, ShardSet], positions: np.ndarray) -> list[Place]:
    numbers = {dataset: {info.name: at for at, info in enumerate(own.shards)} for dataset, own in shards.items()}
    records = features.records(features.row_ids(positions), ["shard", "offset"])
    return [(record["dataset"], numbers[record["dataset"]][record["shard"]], record["offset"]) for record in records]


def _table(features: FeatureSet, first: np.ndarray, exact: np.ndarray) -> pa.Table:
    """The members of every group of two or more, group after group."""
    grouped = first != np.arange(len(first))
    grouped[first[grouped]] = True
    members = np.flatnonzero(grouped)
    members = members[np.lexsort((members, first[members]))]
    kind = np.where(np.isin(members, exact[:, 1]), "exact", "near")
    kind[first[members] == members] = "kept"
    records = features.records(features.row_ids(members), ["key", "shard", "offset"])
    columns = {
        "dataset": [record["dataset"] for record in records],
        "key": [record["key"] for record in records],
        "shard": [record["shard"] for record in records],
        "record": pa.array([record["offset"] for record in records], pa.int64()),
        "group": np.unique(first[members], return_inverse=True)[1].astype(np.int64),
        "kind": kind.tolist(),
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def _write_list(path: Path, dataset: str, shards: ShardSet, excluded: pa.Table) -> None:
    """The dataset's shards without the excluded records; those that were left out before stay so."""
    left_out: dict[str, list[int]] = {}
    for row in excluded.to_pylist():
        if row["dataset"] == dataset:
            left_out.setdefault(row["shard"], []).append(row["record"])
    write_filtered(path, [info.without(left_out.get(info.name, ())) for info in shards.shards])
