"""`sslscale cluster`: k-means over the parts of a feature store.

cluster/<name>/centroids.npy                         (K, D) fp32
cluster/<name>/assignments/<dataset>/part-00042.npy  int32, aligned to the feature part's rows
cluster/<name>/distances/<dataset>/part-00042.npy    fp32, to the own centroid: Euclidean, or 1 - cosine
cluster/<name>/metrics.jsonl                         the objective at every iteration
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sslscale.cluster.kmeans import KMeansWorker, PoolRows, check_num_clusters
from sslscale.cluster.lloyd import LloydState, lloyd, schedule
from sslscale.cluster.measures import davies_bouldin, imbalance, label_measures, silhouette
from sslscale.cluster.seeding import initial_state
from sslscale.config import ClusterConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features, sample_positions
from sslscale.features.distance import to_objective
from sslscale.features.files import write_npy
from sslscale.rundir import Metrics, RunDir, Stage
from sslscale.runtime.base import Pool, Resources, Runtime, compute_threads
from sslscale.runtime.progress import Progress


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
    check_num_clusters(settings.num_clusters, features.num_rows)
    threads = config.runtime.threads
    stage = run.open_stage(
        "cluster",
        name,
        {**settings.identity(), "seed": config.seed, "threads": threads},
        {"features": features.identity},
        overwrite=overwrite,
    )
    if stage.done:
        return stage.result
    setup = {"features": features.paths, "metric": settings.metric, "output": str(stage.path)}
    workers = min(config.runtime.workers, len(features.parts))
    with (
        compute_threads(threads),
        runtime.pool(KMeansWorker, setup, workers, Resources(threads=threads)) as pool,
    ):
        state = _fit(stage, settings, config.seed, pool, features)
        centroids = state.centroids[state.best]
        write_npy(stage.path / "centroids.npy", centroids)
        objective = _assign_parts(stage, pool, features, centroids)
    with compute_threads(threads):
        measures = _measure(stage, settings, config.seed, features, centroids)
    iterations = int(state.iterations[state.best])
    counts = {"num_clusters": settings.num_clusters, "num_samples": features.num_rows}
    return stage.finish({**counts, "objective": objective, "iterations": iterations, **measures})


def _fit(stage: Stage, settings: ClusterConfig, seed: int, pool: Pool, features: FeatureSet) -> LloydState:
    """Lloyd's iterations, each one saved in state.npz; goes on from there if it exists."""
    path = stage.path / "state.npz"
    rows = PoolRows(pool, features)
    metrics = Metrics(stage.path / "metrics.jsonl")
    if path.is_file():
        state = LloydState.load(path)
    else:
        state = initial_state(rows, settings.num_clusters, settings.init, settings.num_init, seed)
        state.save(path)
    metrics.keep(lambda line: line["iteration"] <= state.passes)

    with Progress("cluster", total=settings.max_iterations + 1, unit="iterations") as progress:
        progress.start_at(state.passes)

        def checkpoint(state: LloydState) -> None:
            best = to_objective(state.objective[state.best], settings.metric)
            metrics.append(iteration=state.passes, objective=best, restarts=int(state.active.sum()))
            state.save(path)
            progress.advance(1, objective=best)

        return lloyd(
            rows,
            state,
            metric=settings.metric,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            steps=schedule(settings.method, features.num_rows, features.dim, settings.num_clusters),
            checkpoint=checkpoint,
        )


def _assign_parts(stage: Stage, pool: Pool, features: FeatureSet, centroids: np.ndarray) -> float:
    """Assigns the parts that are not yet, and returns the objective over all, added in their order."""
    missing = [part.number for part in features.parts if stage.part_done(str(part.number)) is None]
    with Progress("assign", total=features.num_rows, unit="rows") as progress:
        progress.start_at(features.num_rows - sum(features.parts[number].rows for number in missing))
        for index, record in pool.map("assign", missing, centroids):
            stage.finish_part(str(missing[index]), record)
            progress.advance(record["rows"])
    records = [stage.part_done(str(part.number)) for part in features.parts]
    return sum(record["objective"] for record in records if record is not None)


def _measure(
    stage: Stage, settings: ClusterConfig, seed: int, features: FeatureSet, centroids: np.ndarray
) -> dict[str, Any]:
    files = [part.file for part in features.parts]
    assignments = np.concatenate([np.load(stage.path / "assignments" / file) for file in files])
    distances = np.concatenate([np.load(stage.path / "distances" / file) for file in files])
    sizes = np.bincount(assignments, minlength=len(centroids))
    at = sample_positions(features.num_rows, settings.silhouette_samples, seed)
    # between unit vectors the Euclidean distance is sqrt(2 (1 - cosine))
    euclidean = distances if settings.metric == "l2" else np.sqrt(2 * distances)
    measures = {
        **label_measures(features.labels(), assignments),
        "silhouette": silhouette(features.take(features.row_ids(at)), assignments[at], settings.metric),
        "davies_bouldin": davies_bouldin(centroids, assignments, euclidean),
        "imbalance": imbalance(sizes),
    }
    result: dict[str, Any] = {"measures": measures, "sizes": sizes.tolist()}
    if len(features.stores) > 1:
        result["datasets"] = {
            name: {
                "num_samples": here.stop - here.start,
                "measures": label_measures(features.labels(name), assignments[here]),
            }
            for name, here in features.slices.items()
        }
    return result
