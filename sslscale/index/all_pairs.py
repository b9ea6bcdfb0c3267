"""The k nearest neighbours of every row among all rows: what duplicates, graphs and anomaly scores are made from.

neighbours/<name>/ids/<dataset>/part-00042.npy        int64 (n, k), row ids of the set, nearest first
neighbours/<name>/distances/<dataset>/part-00042.npy  fp32 (n, k)

Rows are sorted into about 2 sqrt(N) lists around k-means centroids, and every row is searched in the `nprobe` lists
nearest to it. The search goes list by list: all rows of a group of lists that probe a list meet it in one matrix
product. A few rows are searched exactly first; the lists that their neighbours lie in say how many have to be probed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from sslscale.config import RunConfig
from sslscale.features import FeatureSet, sample_positions
from sslscale.features.distance import prepare
from sslscale.features.files import open_npy, write_npy
from sslscale.index.all_pairs_worker import AllPairsWorker, part_file
from sslscale.index.exact import SetReference, exact_knn
from sslscale.rundir import RunDir, Stage, discard, read_json
from sslscale.runtime.base import Pool, Resources, Runtime, compute_threads
from sslscale.runtime.progress import Progress

GROUP_ROWS = 2**15  # that are searched and committed together
TRAIN_ROWS_PER_LIST = 64
ITERATIONS = 10
RECALL_QUERIES = 1000


class Neighbours:
    """The finished neighbours of a feature set, in `path`."""

    def __init__(self, path: Path, features: FeatureSet) -> None:
        self.path, self.features = path, features

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances fp32 and row ids int64 of part `number`'s neighbours, both (n, k), memory-mapped."""
        file = self.features.parts[number].file
        return open_npy(self.path / "distances" / file), open_npy(self.path / "ids" / file)


def all_pairs(
    run: RunDir,
    config: RunConfig,
    runtime: Runtime,
    features: FeatureSet,
    *,
    k: int,
    metric: str,
    wanted_recall: float,
    name: str = "main",
    overwrite: bool = False,
) -> Neighbours:
    """Every row's k nearest other rows, in RUN/neighbours/<name>; continues what an earlier call left.

    A row is left out of its own neighbours by its id, so its duplicates stay. Distances are computed again from the
    differences, as in `exact_knn`. `wanted_recall` is the share of the exact neighbours that must be found, on a sample
    and within two standard errors; 1 searches everything. The result depends on neither the number of workers nor
    what was interrupted. result.json: `num_samples, k, metric, num_lists, nprobe, recall`.
    """
    threads = config.runtime.threads
    settings = {"k": k, "metric": metric, "wanted_recall": wanted_recall, "seed": config.seed, "threads": threads}
    stage = run.open_stage("neighbours", name, settings, {"features": features.identity}, overwrite=overwrite)
    if not stage.done:
        setup: dict[str, Any] = {"features": features.paths, "folder": str(stage.path), "k": k, "metric": metric}
        setup["group_rows"] = GROUP_ROWS
        with compute_threads(threads):
            plan = stage.part_done("partition") or _partition(stage, features, config.seed)
        with runtime.pool(AllPairsWorker, setup, config.runtime.workers, Resources(threads=threads)) as pool:
            parts = range(len(features.parts))
            _phase(stage, pool, "assign", parts, plan["nprobe"], features.num_rows)
            groups = range(AllPairsWorker(**setup).layout.num_groups)
            _phase(stage, pool, "sort", groups, plan["nprobe"], features.num_rows)
            _phase(stage, pool, "search", groups, None, features.num_rows)
            _phase(stage, pool, "gather", parts, None, features.num_rows)
        stage.finish({"num_samples": features.num_rows, "k": k, "metric": metric, **plan})
    discard(stage.path / "work")
    return Neighbours(stage.path, features)


def _phase(stage: Stage, pool: Pool, method: str, items: Sequence[int], broadcast: Any, rows: int) -> None:
    """Maps `method` over the items whose marker is missing; each is committed on its own."""
    records = {item: stage.part_done(part_file(method, item)) for item in items}
    todo = [item for item, record in records.items() if record is None]
    if not todo:
        return
    with Progress(f"neighbours, {method}", total=rows, unit="rows") as progress:
        progress.start_at(sum(record["rows"] for record in records.values() if record))
        for index, record in pool.map(method, todo, broadcast):
            stage.finish_part(part_file(method, todo[index]), record)
            progress.advance(record["rows"])


def _partition(stage: Stage, features: FeatureSet, seed: int) -> dict[str, Any]:
    """Writes the lists' centroids, near ones beside each other; returns and commits `num_lists, nprobe, recall`."""
    metric, wanted = stage.settings["metric"], stage.settings["wanted_recall"]
    num_lists = 2 ** round(math.log2(2 * math.sqrt(features.num_rows)))
    at = sample_positions(features.num_rows, TRAIN_ROWS_PER_LIST * num_lists, seed)
    rows = _vectors(features.take(features.row_ids(at)), metric)
    trainer = faiss.Kmeans(
        features.dim, min(num_lists, len(rows)), niter=ITERATIONS, seed=seed, min_points_per_centroid=1
    )
    trainer.train(rows)
    assert trainer.centroids is not None
    centroids = trainer.centroids[_side_by_side(trainer.centroids)]
    nprobe, recall = _probes_needed(features, centroids, stage.settings["k"], metric, wanted, seed)
    write_npy(stage.path / "work" / "centroids.npy", centroids)
    plan = {"num_lists": len(centroids), "nprobe": nprobe, "recall": recall}
    stage.finish_part("partition", plan)
    return plan


def _vectors(rows: np.ndarray, metric: str) -> np.ndarray:
    return np.ascontiguousarray(prepare(rows, metric), dtype=np.float32)


def _side_by_side(centroids: np.ndarray) -> np.ndarray:
    """An order in which near centroids follow each other: halves along the principal direction, again and again."""
    if len(centroids) <= 8:
        return np.arange(len(centroids))
    centred = centroids - centroids.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    order = np.argsort(centred @ direction, kind="stable")
    halves = np.array_split(order, 2)
    return np.concatenate([half[_side_by_side(centroids[half])] for half in halves])


def _probes_needed(
    features: FeatureSet, centroids: np.ndarray, k: int, metric: str, wanted: float, seed: int
) -> tuple[int, float]:
    """How many lists must be probed, and the sample's recall with as many.

    A row's neighbour is found exactly if the neighbour's list is among the row's nearest lists. The fewest are taken
    for which recall less two standard errors is above `wanted`.
    """
    ids = features.row_ids(sample_positions(features.num_rows, RECALL_QUERIES, seed))
    rows = features.take(ids)
    neighbours = exact_knn(rows, ids, SetReference(features), k, metric)[1]
    homes = _nearest_list(features.take(neighbours.ravel()), centroids, metric).reshape(neighbours.shape)
    everything = faiss.knn(_vectors(rows, metric), centroids, len(centroids))[1]
    rank = np.argsort(everything, axis=1)  # (n, L): of each list, for each row
    needed = np.take_along_axis(rank, homes, 1) + 1  # (n, k)
    for nprobe in range(1, len(centroids)):
        recalls = (needed <= nprobe).mean(axis=1)
        if recalls.mean() - 2 * recalls.std() / math.sqrt(len(recalls)) > wanted:
            return nprobe, float(recalls.mean())
    return len(centroids), 1.0


def _nearest_list(rows: np.ndarray, centroids: np.ndarray, metric: str) -> np.ndarray:
    return faiss.knn(_vectors(rows, metric), centroids, 1)[1][:, 0]
