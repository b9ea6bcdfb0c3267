"""K-means over parts on disk: anonymous memory of every process, and the time of an iteration, as the rows grow.

    python benchmarks/cluster_memory.py [--rows 5000000 50000000] [--dim 64] [--clusters 1024] [--workers 2]
    python benchmarks/cluster_memory.py --rows 100000000 --dim 16 --clusters 1000

Random fp16 rows in parts of 2^18, exact iterations over all of them. Memory is RssAnon (memory-mapped
pages are not counted), sampled every 50 ms, above what the process had once its imports were done. `planned` is the
seconds of an iteration by the formulas of `sslscale plan --vectors` and rates that are measured here beforehand. The
limits beside it: a large fp32 product on as many threads, and the parts read from a disk whose cache was dropped.
"""

from __future__ import annotations

import argparse
import os
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

ITERATIONS = 3
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


def disk_rate(features: FeatureSet) -> float:
    """Bytes a second of reading the first parts, 1 GB at most, none of which the system has in memory."""
    size, start = 0, time.perf_counter()
    for part in features.parts:
        with (Path(features.paths["train"]) / Path(part.file).name).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while data := file.read(2**24):
                size += len(data)
        if size > 2**30:
            break
    return size / (time.perf_counter() - start)


def measure(features: FeatureSet, output: str, clusters: int, workers: int) -> dict[str, Any]:
    setup = {"features": features.paths, "metric": "l2", "output": output}
    vectors = Vectors(features.num_rows, features.dim, clusters, PART_ROWS)
    rates = measure_rates(features.dim, clusters, threads=1)
    planned = pass_time(flat_pass(vectors), rates, HERE, workers)
    disk = disk_rate(features)
    ends: list[float] = []
    with LocalRuntime().pool(KMeansWorker, setup, workers, Resources(threads=1)) as pool:
        parts = [part.number for part in features.parts]
        list(pool.map("gather", [(0, np.arange(1))] * workers))  # the workers are up, their imports done
        memory = Memory()
        memory.start()
        time.sleep(0.2)
        rows = PoolRows(pool, features, Path(output))
        state = initial_state(rows, clusters, "random", 1, seed=0)

        def checkpoint(state: LloydState) -> None:
            ends.append(time.perf_counter())

        start = time.perf_counter()
        state = lloyd(rows, state, metric="l2", max_iterations=ITERATIONS, tolerance=0, checkpoint=checkpoint)
        list(pool.map("assign", parts, (state.centroids[0], None)))
        memory.done.set()
        memory.join()
    seconds = np.diff([start, *ends])
    typical = float(np.median(seconds))
    return {
        "rows": features.num_rows,
        "seconds_per_iteration": round(typical, 2),
        "planned": round(planned.seconds, 2),
        "gflops_per_second": round(flat_pass(vectors).flops / typical / 1e9, 1),
        "gb_per_second": round(vectors.bytes / typical / 1e9, 3),
        "limits": {
            "gflops_per_second": round(workers * rates.matrix / 1e9, 1),
            "disk_gb_per_second": round(disk / 1e9, 3),
        },
        "rss_anon_mb_above_imports": memory.above(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000, 50_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    runs = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            random_store(Path(folder), rows, options.dim, noise=1.0)
            features = FeatureSet.open({"train": folder})
            runs.append(measure(features, f"{folder}/out", options.clusters, options.workers))
    settings = {
        "dim": options.dim,
        "dtype": "fp16",
        "clusters": options.clusters,
        "workers": options.workers,
        "threads": 1,
    }
    write_result(f"cluster-memory-{options.dim}d", {**settings, "runs": runs})


if __name__ == "__main__":
    main()
