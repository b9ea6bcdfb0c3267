"""Hierarchical k-means against flat: SSE, distances that were computed, and how uneven the clusters are.

    python benchmarks/cluster_hierarchy.py [--rows 4000000] [--clusters 65536] [--flat-iterations 10]

HOG features of Fashion-MNIST in their 64 leading directions, expanded by noise (`features` of index_auto.py), fp16 in
parts of 2^18. `sslscale cluster` with `method=hierarchical`, then the best flat run that is affordable here: iterations
over all rows that begin at the hierarchical centroids, where no start of its own could bring it, go past the means but
for the last, and compare with clusters nearby (see sslscale.cluster.lloyd). Its last SSE is exact.

Distances a row: hierarchical at most so many (the parents' iterations as they were made, those of the splits as if none
had ended before `max_iterations`, the starts, the joint iterations and the assignment). Of flat k-means two figures:
what the run above would take if each of its passes compared with all clusters (it compares with clusters nearby),
without the hierarchical run that it begins with; and what a run from a start of its own takes by as many iterations as
one level may have and the assignment, which was not made.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result, write_store
from index_auto import features as expanded

from sslscale.cluster.kmeans import KMeansWorker, PoolRows
from sslscale.cluster.lloyd import PLAIN, RELAXATION, SAMPLE_PER_CLUSTER, LloydState, Step, lloyd
from sslscale.cluster.stage import run_cluster
from sslscale.config import RunConfig
from sslscale.features import open_features
from sslscale.features.files import open_npy
from sslscale.rundir import RunDir, read_lines
from sslscale.runtime.base import Resources, make_runtime

DIM, MAX_ITERATIONS = 64, 20
START = 10  # distances a row and cluster of greedy k-means++, at most: 2 + log K trials for each of K choices


def flat_from(centroids: np.ndarray, rows: PoolRows, iterations: int) -> list[float]:
    """The SSE before each of `iterations` updates and after the last one."""
    found: list[float] = []
    lloyd(
        rows,
        LloydState.start(centroids[None]),
        metric="l2",
        max_iterations=iterations,
        tolerance=0.0,
        steps=[Step(1.0, RELAXATION, 0.0, exact=False), PLAIN],
        checkpoint=lambda state: found.append(float(state.objective[0])),
    )
    return found


def measure(folder: Path, rows: int, clusters: int, flat_iterations: int) -> dict[str, Any]:
    write_store(folder, np.ascontiguousarray(expanded(rows, 1)[:, -DIM:]), dtype="fp16")
    settings = {"num_clusters": clusters, "method": "hierarchical", "max_iterations": MAX_ITERATIONS, "num_init": 1}
    runtime_settings = {"name": "local", "workers": 2, "threads": 1}
    config = RunConfig.model_validate({"cluster": settings, "runtime": runtime_settings})
    runtime = make_runtime("local")
    with RunDir(folder) as run:
        start = time.perf_counter()
        result = run_cluster(run, config, runtime)
        seconds = time.perf_counter() - start
        print({name: value for name, value in result.items() if name != "sizes"}, round(seconds), flush=True)
        features = open_features(run, None)
        setup = {"features": features.paths, "metric": "l2", "output": str(folder / "flat")}
        with runtime.pool(KMeansWorker, setup, 2, Resources(threads=1)) as pool:
            start = time.perf_counter()
            centroids = np.array(open_npy(run.path / "cluster/main/centroids.npy"))
            flat = flat_from(centroids, PoolRows(pool, features, folder / "flat"), flat_iterations)
            flat_seconds = time.perf_counter() - start
        fitted = sum(line["share"] for line in read_lines(run.path / "cluster/main/hierarchy/parents.jsonl"))
    parents, children = result["num_parents"], clusters / result["num_parents"]
    of_parents = (fitted + START * min(1.0, SAMPLE_PER_CLUSTER * parents / rows) + 1) * parents  # and the partition
    distances = of_parents + (MAX_ITERATIONS + 1 + START) * children + result["distances_per_row"]
    flat_distances = {"flat, as made": len(flat) * clusters, "flat, from a start": (MAX_ITERATIONS + 1) * clusters}
    return {
        "seconds": {"hierarchical": round(seconds, 1), "flat": round(flat_seconds, 1)},
        "sse": {"hierarchical": result["objective"], "flat, pass by pass": flat},
        "sse_over_flat": round(result["objective"] / flat[-1], 4),
        "distances_per_row": {"hierarchical": round(distances), **flat_distances},
        "times_fewer_distances": {name: round(of / distances, 1) for name, of in flat_distances.items()},
        "imbalance": round(result["measures"]["imbalance"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--clusters", type=int, default=65_536)
    parser.add_argument("--flat-iterations", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rows, options.clusters, options.flat_iterations)
    write_result("cluster-hierarchy", {**vars(options), "dim": DIM, **found})


if __name__ == "__main__":
    main()
