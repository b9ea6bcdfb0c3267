"""Where k-means begins: SSE after 10 exact iterations and seconds of the start, mean of 10 seeds, on three data sets.

    python benchmarks/cluster_init.py [--seeds 10] [--clusters 1000]

HOG features of Fashion-MNIST in 64 random projections, Gaussian blobs of unequal sizes, and isotropic Gaussian rows;
32,768 rows of 64 dimensions each.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from cluster_time_to_quality import expanded
from common import write_result

from sslscale.cluster.lloyd import ArrayRows, lloyd
from sslscale.cluster.seeding import initial_state
from sslscale.runtime.base import compute_threads

ROWS, DIM, ITERATIONS = 32_768, 64, 10
INITS = ("random", "k-means++", "kmeans||")


def datasets() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    projection = generator.standard_normal((384, DIM), dtype=np.float32) / np.sqrt(DIM, dtype=np.float32)
    sizes = generator.dirichlet(np.full(1000, 0.5))
    centres = 3 * generator.standard_normal((1000, DIM), dtype=np.float32)
    noise = generator.standard_normal((ROWS, DIM), dtype=np.float32)
    return {
        "fashion_mnist_hog": expanded(ROWS) @ projection,
        "unequal_blobs": centres[generator.choice(1000, ROWS, p=sizes)] + noise,
        "isotropic": generator.standard_normal((ROWS, DIM), dtype=np.float32),
    }


def measure(x: np.ndarray, init: str, clusters: int, seed: int) -> tuple[float, float]:
    """(seconds of the start, SSE after 10 iterations)."""
    rows = ArrayRows(x, "l2")
    start = time.perf_counter()
    state = initial_state(rows, clusters, init, 1, seed)
    seconds = time.perf_counter() - start
    state = lloyd(rows, state, metric="l2", max_iterations=ITERATIONS, tolerance=0.0)
    return seconds, float(state.objective[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--clusters", type=int, default=1000)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "clusters": options.clusters,
        "rows": ROWS,
        "dim": DIM,
        "seeds": options.seeds,
        "data": {},
    }
    with compute_threads(1):
        for name, x in datasets().items():
            runs = {init: [] for init in INITS}  # type: dict[str, list[tuple[float, float]]]
            for seed in range(options.seeds):
                for init in INITS:
                    runs[init].append(measure(x, init, options.clusters, seed))
            best = np.mean([sse for _, sse in runs["k-means++"]])
            result["data"][name] = {
                init: {
                    "seconds_of_start": round(float(np.median([seconds for seconds, _ in own])), 3),
                    "sse_against_kmeans++": round(float(np.mean([sse for _, sse in own]) / best), 4),
                }
                for init, own in runs.items()
            }
    write_result("cluster-init", result)


if __name__ == "__main__":
    main()
