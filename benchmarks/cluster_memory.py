"""K-means over parts on disk: anonymous memory of every process, and the time of an iteration, as the rows grow.

    python benchmarks/cluster_memory.py [--rows 2500000 5000000] [--clusters 1024] [--workers 2]

Random fp16 rows of 64 dimensions in parts of 2^18, exact iterations over all of them. Memory is RssAnon (memory-mapped
pages are not counted), sampled every 50 ms, above what the process had once its imports were done. `planned` is the
seconds of an iteration by the formulas of `sslscale plan --vectors` and rates that are measured here beforehand.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import PART_ROWS, random_store, write_result

from sslscale.cluster.kmeans import KMeansWorker, PoolRows
from sslscale.cluster.lloyd import LloydState, lloyd
from sslscale.cluster.seeding import initial_state
from sslscale.features import FeatureSet
from sslscale.plan.clustering import Vectors, flat_pass, measure_rates, pass_time
from sslscale.plan.model import Machine
from sslscale.plan.probe import anonymous_bytes
from sslscale.runtime.base import Resources
from sslscale.runtime.local import LocalRuntime

DIM, ITERATIONS = 64, 3
HERE = Machine(ranks_per_node=2, link=10e9, network=2e9, store=2e9)  # pipes between processes, files in memory


class Memory(threading.Thread):
    """The highest RssAnon of this process and its children above their first, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        self.done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.05):
            for process in [me, *me.children()]:
                anonymous = anonymous_bytes(process.pid)
                self.first.setdefault(process.pid, anonymous)
                self.peak[process.pid] = max(self.peak.get(process.pid, 0), anonymous)

    def above(self) -> list[int]:
        return sorted((self.peak[pid] - self.first[pid]) // 2**20 for pid in self.peak)


def measure(features: FeatureSet, output: str, clusters: int, workers: int) -> dict[str, Any]:
    setup = {"features": features.paths, "metric": "l2", "output": output}
    vectors = Vectors(features.num_rows, DIM, clusters, PART_ROWS)
    planned = pass_time(flat_pass(vectors), measure_rates(DIM, clusters, threads=1), HERE, workers)
    ends: list[float] = []
    with LocalRuntime().pool(KMeansWorker, setup, workers, Resources(threads=1)) as pool:
        parts = [part.number for part in features.parts]
        list(pool.map("gather", [(0, np.arange(1))] * workers))  # the workers are up, their imports done
        memory = Memory()
        memory.start()
        time.sleep(0.2)
        rows = PoolRows(pool, features)
        state = initial_state(rows, clusters, "random", 1, seed=0)

        def checkpoint(state: LloydState) -> None:
            ends.append(time.perf_counter())

        start = time.perf_counter()
        state = lloyd(rows, state, metric="l2", max_iterations=ITERATIONS, tolerance=0, checkpoint=checkpoint)
        list(pool.map("assign", parts, state.centroids[0]))
        memory.done.set()
        memory.join()
    seconds = np.diff([start, *ends])
    flops = 2 * features.num_rows * clusters * DIM
    return {
        "rows": features.num_rows,
        "seconds_per_iteration": round(float(np.median(seconds)), 2),
        "planned": round(planned.seconds, 2),
        "gflops_per_second": round(flops / float(np.median(seconds)) / 1e9, 1),
        "rss_anon_mb_above_imports": memory.above(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_500_000, 5_000_000])
    parser.add_argument("--clusters", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    runs = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            random_store(Path(folder), rows, DIM, noise=1.0)
            features = FeatureSet.open({"train": folder})
            runs.append(measure(features, f"{folder}/out", options.clusters, options.workers))
    settings = {"dim": DIM, "dtype": "fp16", "clusters": options.clusters, "workers": options.workers, "threads": 1}
    write_result("cluster-memory", {**settings, "runs": runs})


if __name__ == "__main__":
    main()
