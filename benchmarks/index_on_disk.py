"""Building an index on disk under a memory budget: anonymous memory of every process, and the answers.

    python benchmarks/index_on_disk.py [--rows 20000000] [--memory-gb 1] [--workers 2] [--factory IVF1024,SQfp16]

Random fp16 rows of 64 dimensions around 4,096 centres, in parts of 2^18, through `sslscale index` with
index.layout=on_disk. Memory is RssAnon (pages of mapped files are not counted) of this process and its workers, sampled
every 50 ms, above what a process of its kind has once its imports are done; their sum at the same moment counts. Then
the same index is built in memory by plain faiss calls from the same trained state, and both answer the same queries.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
from common import random_store, write_result

from sslscale.config import RunConfig
from sslscale.features import FeatureSet
from sslscale.index import Index
from sslscale.index.build import run_index
from sslscale.index.factory import search_parameters
from sslscale.plan.probe import anonymous_bytes
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

DIM, K = 64, 10


class Memory(threading.Thread):
    """The highest sum of RssAnon over this process and its workers, each above that of its imports, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        code = "import sslscale.index.shard as s, time; print(flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as imports:
            assert imports.stdout is not None
            imports.stdout.readline()
            self.worker = anonymous_bytes(imports.pid)
            imports.kill()
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        own = anonymous_bytes(me.pid)
        while not self.done.wait(0.05):
            total = anonymous_bytes(me.pid) - own
            for process in me.children(recursive=True):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):  # it has just ended
                    total += max(0, anonymous_bytes(process.pid) - self.worker)
            self.peak = max(self.peak, total)


def in_memory(features: FeatureSet, trained: Path) -> faiss.Index:
    index = faiss.read_index(str(trained))
    for part in features.parts:
        index.add(np.asarray(features.block(part.number), dtype=np.float32))
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--factory", default="IVF1024,SQfp16")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--skip-answers", action="store_true", help="measure the memory only")
    options = parser.parse_args()
    index = {
        "factory": options.factory, "metric": "l2", "layout": "on_disk", "memory_gb": options.memory_gb,
        "recall_queries": options.queries,
    }  # fmt: skip
    runtime = {"name": "local", "workers": options.workers, "threads": 1}
    config = RunConfig.model_validate({"index": index, "runtime": runtime})
    with tempfile.TemporaryDirectory() as folder:
        random_store(Path(folder, "embed", "train"), options.rows, DIM, noise=0.5)
        memory = Memory()
        memory.start()
        time.sleep(0.2)
        start = time.perf_counter()
        with RunDir(folder) as run:
            result = run_index(run, config, make_runtime("local"))
        seconds = time.perf_counter() - start
        memory.done.set()
        memory.join()
        found: dict[str, Any] = {}
        if not options.skip_answers:
            found = compare(Path(folder), result, options.queries)
    settings = {"rows": options.rows, "dim": DIM, "memory_gb": options.memory_gb, "workers": options.workers}
    write_result(
        "index-on-disk",
        {
            **settings,
            "factory": result["factory"],
            "bytes": result["bytes"],
            "peak_rss_anon_mb_above_imports": memory.peak // 2**20,
            "seconds": round(seconds, 1),
            "recall_at_10": result["recall_at_10"],
            "nprobe": result["nprobe"],
            **found,
        },
    )


def compare(folder: Path, result: dict[str, Any], count: int) -> dict[str, Any]:
    """Share of queries whose ids are the same as those of the index in memory, and both times."""
    index = Index.open(folder)
    reference = in_memory(index.features, folder / "index" / "main" / result["trained"])
    queries = np.asarray(index.features.block(0)[:count], dtype=np.float32) + np.float32(0.01)
    parameters = search_parameters(reference, index.record.effort)
    start = time.perf_counter()
    _, ids = index.search(queries, K)
    middle = time.perf_counter()
    positions = reference.search(queries, K, params=parameters)[1]
    end = time.perf_counter()
    expected = index.features.row_ids(positions.ravel()).reshape(positions.shape)
    return {
        "same_ids": float(np.mean(ids == expected)),
        "search_ms_on_disk": round(1e3 * (middle - start), 1),
        "search_ms_in_memory": round(1e3 * (end - middle), 1),
    }


if __name__ == "__main__":
    main()
