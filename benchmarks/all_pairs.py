"""The 10 nearest neighbours of every row of 1M x 128, against `faiss.knn` on as many threads.

    python benchmarks/all_pairs.py [--data features mixture surface] [--rows 1000000] [--queries 20000]

Ours is the whole command: partition, search, exact distances, files. faiss's time is that of the first `queries` rows
times N / queries; they also give the exact neighbours, so recall@10 and the rank correlation of the anomaly scores
(mean distance to the 10 neighbours) are over these rows. The limit beside it is this machine's sgemm.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import PART_ROWS, matrix_rate, write_result, write_store
from index_auto import DATA
from scipy.stats import spearmanr

from sslscale.config import RunConfig
from sslscale.features import open_features
from sslscale.index.all_pairs import all_pairs
from sslscale.rundir import RunDir
from sslscale.runtime.base import compute_threads, make_runtime

K = 10


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    x = DATA[name](arguments.rows, 0)
    write_store(folder, x)
    run, threads = RunDir(folder), arguments.workers * arguments.threads
    config = RunConfig.model_validate(
        {"runtime": {"name": "local", "workers": arguments.workers, "threads": arguments.threads}}
    )
    start = time.perf_counter()
    found = all_pairs(
        run, config, make_runtime("local"), open_features(run), k=K, metric="l2", wanted_recall=arguments.recall
    )
    ours = time.perf_counter() - start
    queries = x[: arguments.queries]
    with compute_threads(threads):
        faiss.knn(queries[:1000], x[:PART_ROWS], K + 1)
        start = time.perf_counter()
        squared, at = faiss.knn(queries, x, K + 1)
        theirs = (time.perf_counter() - start) * len(x) / len(queries)
    other = at != np.arange(len(queries))[:, None]
    other[other.all(axis=1), -1] = False  # a row whose duplicates left no place for itself
    at, distances = (array[other].reshape(len(queries), K) for array in (at, np.sqrt(np.maximum(squared, 0))))
    own_distances, ids = (array[: len(queries)] for array in found.block(0))
    ids = (ids >> 32) * PART_ROWS + (ids & 0xFFFFFFFF)  # row ids -> positions
    recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, at, strict=True)]) / K
    return {
        "seconds": ours,
        "faiss_knn_seconds": theirs,
        "ratio": theirs / ours,
        "recall_at_10": float(recall),
        "spearman_of_scores": float(spearmanr(own_distances.mean(axis=1), distances.mean(axis=1)).statistic),
        "faiss_knn_share_of_sgemm": 2 * len(x) ** 2 * x.shape[1] / theirs / matrix_rate(threads),
        **{key: found.result[key] for key in ("num_lists", "nprobe", "recall")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=20_000, help="at most 2^18, the rows of the first part")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, arguments, Path(folder))
            print(name, results[name], flush=True)
    missing = [name for name in DATA if name not in results]
    required = {"ratio": 10, "recall_at_10": 0.95, "spearman_of_scores": 0.99}
    write_result(
        "all-pairs", {"settings": vars(arguments), "datasets": results, "missing": missing, "required": required}
    )


if __name__ == "__main__":
    main()
