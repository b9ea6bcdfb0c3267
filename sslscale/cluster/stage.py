"""`sslscale cluster`: k-means over the parts of a feature store, or another clusterer where the rows are few.

cluster/<name>/centroids.npy                         (K, D) fp32
cluster/<name>/assignments/<dataset>/part-00042.npy  int32, aligned to the feature part's rows
cluster/<name>/distances/<dataset>/part-00042.npy    fp32, to the own centroid: Euclidean, or 1 - cosine
cluster/<name>/metrics.jsonl                         the objective at every iteration
cluster/<name>/sweep/<K>.jsonl                       the same, where several numbers of clusters are tried

Of result.json: `schedule`, how the k-means iterations went (see `lloyd.Step`); `sweep`, one line a number of clusters
(see `sweep.describe`), and `num_clusters` the one chosen by `sweep.choose`; `num_parents` of the hierarchical method,
and `distances_per_row` of its iterations of all clusters and the assignment; `noise`, the rows that hdbscan left out,
which are assigned to the nearest centroid; `warnings` of clusters that are empty or hold nearly everything.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.cluster.hierarchy import (
    JOINT_NEAR,
    NEAR_PARENTS,
    RESAMPLINGS,
    child_counts,
    compared,
    moved_together,
    num_parents,
    relaxations,
    sample_limit,
    split,
    tree_of,
)
from sslscale.cluster.kernels import nearest_centroid, squared_distances
from sslscale.cluster.kmeans import BY_PARENT, METHODS, RANGES, KMeansWorker, PoolRows, check_num_clusters
from sslscale.cluster.lloyd import LloydState, lloyd, schedule
from sslscale.cluster.measures import Tally, davies_bouldin, imbalance, silhouette
from sslscale.cluster.others import MAX_ROWS, NOISE, check_rows, fit_labels, means
from sslscale.cluster.seeding import initial_state
from sslscale.cluster.sweep import choose, describe, sample_size
from sslscale.cluster.tree import Tree
from sslscale.config import ClusterConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features, sample_positions
from sslscale.features.distance import prepare, to_distance, to_objective
from sslscale.features.files import open_npy, write_npy
from sslscale.rundir import Metrics, RunDir, Stage, discard, read_json, write_atomic, write_json
from sslscale.runtime.base import Pool, Resources, Runtime, compute_threads
from sslscale.runtime.progress import Progress

SUSPICIOUS_SHARE = 0.9


def run_cluster(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Fits and assigns the datasets of `config.cluster`; continues where an earlier call stopped, at any iteration.

    Returns result.json. Its measures are over all rows; with several datasets, `datasets` has each one's own.
    """
    settings = config.cluster
    if settings is None:
        raise UserError("the config has no section 'cluster'", fix="add one, or leave this stage out")
    features = open_features(run, settings.datasets)
    if settings.method == "objective":
        features.check_column("cluster_probs")
    numbers = _numbers(settings, features.num_rows)
    threads = config.runtime.threads
    identity = {**settings.identity(), "seed": config.seed, "threads": threads}
    parents = {"features": features.identity}
    stage = run.open_stage("cluster", name, identity, parents, overwrite=overwrite)
    if stage.done:
        return stage.result
    device = runtime.device(settings.device)
    if overwrite and _begun_on(stage, device) != device:
        discard(stage.path)
        stage = run.open_stage("cluster", name, identity, parents)
    if settings.method in METHODS:
        _stay_on(stage, device)
    setup = {"features": features.paths, "metric": settings.metric, "output": str(stage.path), "device": device}
    workers = min(config.runtime.workers, len(features.parts))
    resources = Resources(threads=threads, gpus=1.0 if device == "cuda" else 0.0)
    with compute_threads(threads):
        if settings.method in MAX_ROWS:
            found = _fit_at_once(stage, settings, config.seed, features)
        else:
            with runtime.pool(KMeansWorker, setup, workers, resources) as pool:
                fit = {"hierarchical": _fit_hierarchy, "objective": _take_given}.get(settings.method, _fit_kmeans)
                found = fit(stage, settings, numbers, config.seed, pool, features)
        measures = _measure(stage, settings, config.seed, features, open_npy(stage.path / "centroids.npy"))
    return stage.finish({"num_samples": features.num_rows, **found, **measures})


def _begun_on(stage: Stage, device: str) -> str:
    """What the iterations ran on before they were interrupted; `device` if they were not."""
    file = stage.path / "device.json"
    return read_json(file)["device"] if storage.size(file) is not None else device


def _stay_on(stage: Stage, device: str) -> None:
    """Iterations go on on the kind of device that they were begun on: early ones differ between CPUs and GPUs."""
    begun = _begun_on(stage, device)
    if begun != device:
        raise UserError(
            "this clustering was begun on another device",
            got=device,
            allowed=begun,
            fix=f"set cluster.device={begun}, or begin again with --overwrite",
        )
    write_json(stage.path / "device.json", {"device": device})


def _numbers(settings: ClusterConfig, num_rows: int) -> list[int]:
    """The numbers of clusters to try, ascending; UserError for one that cannot be."""
    given = settings.num_clusters
    numbers = sorted(set(given)) if isinstance(given, list) else [given]
    for number in numbers:
        check_num_clusters(number, num_rows)
    if settings.method in MAX_ROWS:
        check_rows(settings.method, num_rows)
    return numbers


def _fit_at_once(stage: Stage, settings: ClusterConfig, seed: int, features: FeatureSet) -> dict[str, Any]:
    """Clusters all rows in this process, and writes what k-means would."""
    positions = np.arange(features.num_rows)
    x = prepare(features.take(features.row_ids(positions)), settings.metric)
    assert isinstance(settings.num_clusters, int)
    labels = fit_labels(x, settings.method, settings.num_clusters, settings.num_init, seed)
    centroids = prepare(means(x, labels), settings.metric)
    noise = labels == NOISE
    labels[noise] = nearest_centroid(x[noise], centroids)
    squared = squared_distances(x, centroids, labels)
    write_npy(stage.path / "centroids.npy", centroids)
    start = 0
    for part in features.parts:
        here = slice(start, start + part.rows)
        write_npy(stage.path / "assignments" / part.file, labels[here])
        distances = to_distance(squared[here], settings.metric).astype(np.float32)
        write_npy(stage.path / "distances" / part.file, distances)
        start += part.rows
    objective = to_objective(squared.sum(), settings.metric)
    return {"num_clusters": len(centroids), "objective": objective, "iterations": 0, "noise": int(noise.sum())}


def _fit_kmeans(
    stage: Stage, settings: ClusterConfig, numbers: list[int], seed: int, pool: Pool, features: FeatureSet
) -> dict[str, Any]:
    """Fits each number of clusters, chooses one, and assigns all rows."""
    sweep: dict[str, Any] = {}
    chosen, name = numbers[0], stage.path / "state"
    if isinstance(settings.num_clusters, list):
        lines = [_sweep_line(stage, settings, number, seed, pool, features) for number in numbers]
        chosen = choose(lines)
        sweep, name = {"sweep": lines}, stage.path / "sweep" / str(chosen)
    state = _fit(PoolRows(pool, features, stage.path), name, settings, chosen, seed)
    discard(stage.path / RANGES)  # what a process that was killed has left
    if sweep:
        write_atomic(stage.path / "metrics.jsonl", name.with_suffix(".jsonl").read_bytes())
    centroids = state.centroids[state.best]
    write_npy(stage.path / "centroids.npy", centroids)
    return {
        "num_clusters": chosen,
        "objective": _assign_parts(stage, pool, features, (centroids, None)),
        "iterations": int(state.iterations[state.best]),
        "schedule": [asdict(step) for step in schedule(settings.method, features.num_rows, chosen)],
        **sweep,
    }


def _fit_hierarchy(
    stage: Stage, settings: ClusterConfig, numbers: list[int], seed: int, pool: Pool, features: FeatureSet
) -> dict[str, Any]:
    """Parents over all rows, their children parent by parent, and the assignment among those that are near."""
    folder = stage.path / "hierarchy"
    state = _fit(PoolRows(pool, features, stage.path), folder / "parents", settings, num_parents(numbers[0]), seed)
    parents = state.centroids[state.best]
    parts = [part.number for part in features.parts]
    for turn in range(RESAMPLINGS if settings.balanced else 0):
        parents = _fit_evenly(folder / f"parents-{turn}.npy", settings, parents, seed, turn, pool, parts)
    sizes = sum(own for _, own in pool.map("partition", parts, (parents, "all")))
    counts = child_counts(sizes, numbers[0], settings.balanced)
    used = np.flatnonzero(counts).tolist()
    files = {parent: folder / f"children-{parent:06d}.npy" for parent in used}
    there = set(storage.names(folder))
    missing = [(parent, int(counts[parent])) for parent in used if files[parent].name not in there]
    with Progress("split", total=len(missing), unit="parents") as progress:
        broadcast = ("all", settings.init, settings.max_iterations, settings.tolerance, seed)
        for _ in pool.map("split", missing, broadcast):
            progress.advance()
    discard(stage.path / BY_PARENT)
    centroids = np.concatenate([np.array(open_npy(file)) for file in files.values()])  # closed one by one
    turns = relaxations(settings.balanced)
    with Progress("all clusters", total=len(turns), unit="iterations") as progress:
        for turn, relaxation in enumerate(turns):
            file = folder / f"centroids-{turn}.npy"
            if file.name not in there:
                rows = PoolRows(pool, features, stage.path)
                write_npy(file, moved_together(rows, centroids, counts, settings.metric, relaxation))
            centroids = open_npy(file)
            progress.advance()
    discard(stage.path / RANGES)
    tree = tree_of(centroids, counts, NEAR_PARENTS)
    write_npy(stage.path / "centroids.npy", centroids)
    return {
        "num_clusters": len(centroids),
        "objective": _assign_parts(stage, pool, features, (centroids, tree)),
        "iterations": int(state.iterations[state.best]),
        "num_parents": len(parents),
        "distances_per_row": sum(compared(sizes, counts, near) for near in [*[JOINT_NEAR] * len(turns), NEAR_PARENTS]),
    }


def _fit_evenly(
    file: Path, settings: ClusterConfig, parents: np.ndarray, seed: int, turn: int, pool: Pool, parts: list[int]
) -> np.ndarray:
    """Parents (P, D) fitted to as many rows of each of `parents`, or to all that it has; kept in `file`."""
    seed, name = seed + turn, f"turn-{turn}"
    if not file.is_file():
        sizes = sum(own for _, own in pool.map("partition", parts, (parents, name)))
        drawn = pool.map("rows_of", np.flatnonzero(sizes).tolist(), (name, sample_limit(1), seed), ordered=True)
        x = np.concatenate([rows for _, rows in drawn])
        number = min(len(parents), len(x))
        write_npy(
            file, split(x, number, settings.metric, settings.init, settings.max_iterations, settings.tolerance, seed)
        )
    return open_npy(file)


def _take_given(
    stage: Stage, settings: ClusterConfig, numbers: list[int], seed: int, pool: Pool, features: FeatureSet
) -> dict[str, Any]:
    """The clusters that the objective gave when the features were embedded.

    A centroid is its rows' mean, under "cosine" of unit length like all others.
    """
    parts = [part.number for part in features.parts if part.rows]
    totals = (own for _, own in pool.map("given", parts, ordered=True))
    sums, sizes = functools.reduce(lambda before, own: (before[0] + own[0], before[1] + own[1]), totals)
    centroids = prepare((sums / np.maximum(sizes, 1)[:, None]).astype(np.float32), settings.metric)
    write_npy(stage.path / "centroids.npy", centroids)
    objective = _assign_parts(stage, pool, features, centroids, "assign_given")
    return {"num_clusters": len(centroids), "objective": objective, "iterations": 0}


def _warnings(sizes: np.ndarray) -> list[str]:
    """What is suspicious about clusters of these sizes (K,)."""
    empty, share = int((sizes == 0).sum()), sizes.max() / sizes.sum()
    found = [f"{empty} of {len(sizes)} clusters are empty"] if empty else []
    return found + ([f"one cluster holds {share:.1%} of the samples"] if share > SUSPICIOUS_SHARE else [])


def _sweep_line(
    stage: Stage, settings: ClusterConfig, number: int, seed: int, pool: Pool, features: FeatureSet
) -> dict[str, Any]:
    part = f"sweep-{number}"
    known = stage.part_done(part)
    if known is not None:
        return known
    state = _fit(PoolRows(pool, features, stage.path), stage.path / "sweep" / str(number), settings, number, seed)
    at = sample_positions(features.num_rows, sample_size(settings), seed)
    sample = prepare(features.take(features.row_ids(at)), settings.metric)
    objective = to_objective(state.objective[state.best], settings.metric)
    line = describe(sample, state.centroids, state.best, objective, settings, seed)
    stage.finish_part(part, line)
    return line


def _fit(rows: PoolRows, name: Path, settings: ClusterConfig, num_clusters: int, seed: int) -> LloydState:
    """The iterations, each one saved in `name`.npz; goes on from there if it exists. `state` logs to metrics.jsonl."""
    path = name.with_suffix(".npz")
    metrics = Metrics(name.with_name("metrics.jsonl") if name.name == "state" else name.with_suffix(".jsonl"))
    if path.is_file():
        state = LloydState.load(path)
    else:
        state = initial_state(rows, num_clusters, settings.init, settings.num_init, seed)
        state.save(path)
    metrics.keep(lambda line: line["iteration"] <= state.passes)

    with Progress("cluster", total=settings.max_iterations + 1, unit="iterations") as progress:
        progress.start_at(state.passes)

        def checkpoint(state: LloydState) -> None:
            at = int(np.lexsort((state.measured, -state.shares))[0])  # the best of those that saw most
            best = to_objective(state.measured[at], settings.metric)
            metrics.append(
                iteration=state.passes,
                objective=best,
                share=float(state.shares[at]),
                restarts=int(state.active.sum()),
            )
            state.save(path)
            progress.advance(1, objective=best)

        return lloyd(
            rows,
            state,
            metric=settings.metric,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            steps=schedule(settings.method, rows.num_rows, num_clusters),
            checkpoint=checkpoint,
        )


def _assign_parts(
    stage: Stage,
    pool: Pool,
    features: FeatureSet,
    clusters: np.ndarray | tuple[np.ndarray, Tree | None],
    method: str = "assign",
) -> float:
    """Assigns the parts that are not yet, and returns the objective over all, added in their order."""
    missing = [part.number for part in features.parts if stage.part_done(str(part.number)) is None]
    with Progress("assign", total=features.num_rows, unit="rows") as progress:
        progress.start_at(features.num_rows - sum(features.parts[number].rows for number in missing))
        for index, record in pool.map(method, missing, clusters):
            stage.finish_part(str(missing[index]), record)
            progress.advance(record["rows"])
    records = [stage.part_done(str(part.number)) for part in features.parts]
    return sum(record["objective"] for record in records if record is not None)


def _measure(
    stage: Stage, settings: ClusterConfig, seed: int, features: FeatureSet, centroids: np.ndarray
) -> dict[str, Any]:
    at = sample_positions(features.num_rows, settings.silhouette_samples, seed)
    tallies = {name: Tally(len(centroids)) for name in features.stores}
    sampled, start = [], 0
    for part in features.parts:
        assignments = open_npy(stage.path / "assignments" / part.file)
        distances = open_npy(stage.path / "distances" / part.file)
        # between unit vectors the Euclidean distance is sqrt(2 (1 - cosine))
        euclidean = distances if settings.metric == "l2" else np.sqrt(2 * distances)
        tallies[part.dataset].add(assignments, euclidean, features.stores[part.dataset].part_labels(part.part))
        sampled.append(assignments[at[(at >= start) & (at < start + part.rows)] - start])
        start += part.rows
    tally = functools.reduce(Tally.merged, tallies.values())
    measures = {
        **tally.label_measures(),
        "silhouette": silhouette(features.take(features.row_ids(at)), np.concatenate(sampled), settings.metric),
        "davies_bouldin": davies_bouldin(centroids, tally),
        "imbalance": imbalance(tally.sizes),
    }
    result: dict[str, Any] = {"measures": measures, "sizes": tally.sizes.tolist(), "warnings": _warnings(tally.sizes)}
    if len(features.stores) > 1:
        result["datasets"] = {
            name: {"num_samples": int(own.sizes.sum()), "measures": own.label_measures()}
            for name, own in tallies.items()
        }
    return result
