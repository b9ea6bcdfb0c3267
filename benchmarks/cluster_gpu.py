"""K-means on a GPU: ours against faiss's on the same card, and the share of the card's measured matrix rate.

    python benchmarks/cluster_gpu.py [--rows 1000000] [--dim 128] [--clusters 4096] [--repeats 5]

Ten exact iterations over all rows from the same centroids, rows in the card's memory; the time without copying them
there. faiss twice: `faiss.Clustering`, as `faiss.Kmeans(gpu=True)` is used, which copies the rows to the card at every
iteration; and its k-means for torch, whose rows stay there, from a start of its own. The faster one counts.
`flash-kmeans` (PyPI) stands beside where it is installed. Products are fp32 without TF32, for all.
"""

from __future__ import annotations

import argparse
from typing import Any

import faiss
import numpy as np
import torch
from common import interleave, write_result
from faiss.contrib.torch.clustering import DatasetAssignGPU, kmeans

from sslscale.cluster.lloyd import ArrayRows, LloydState, lloyd
from sslscale.cluster.on_device import DeviceKernels

ITERATIONS = 10


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large fp32 product."""
    a = torch.randn(8192, 8192, device=device)

    def product() -> None:
        torch.mm(a, a)
        torch.cuda.synchronize()

    return 2 * 8192**3 / interleave({"product": product})["product"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"):
        raise SystemExit("this benchmark needs a CUDA device and faiss-gpu")
    device = torch.device("cuda")
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((options.clusters, options.dim), dtype=np.float32)
    x = centres[generator.integers(0, options.clusters, options.rows)]
    x += generator.standard_normal(x.shape, dtype=np.float32)
    start = x[generator.choice(options.rows, options.clusters, replace=False)]
    rows = ArrayRows(x, "l2", on_device=DeviceKernels(device))
    lloyd(rows, LloydState.start(start[None].copy()), metric="l2", max_iterations=1, tolerance=-1)  # brings the rows

    def ours() -> float:
        state = LloydState.start(start[None].copy())
        return float(lloyd(rows, state, metric="l2", max_iterations=ITERATIONS, tolerance=-1).objective[0])

    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatL2(resources, options.dim)

    def theirs() -> float:
        clustering = faiss.Clustering(options.dim, options.clusters)
        clustering.niter, clustering.max_points_per_centroid = ITERATIONS + 1, options.rows
        faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
        clustering.train(x, index)
        return float(clustering.iteration_stats.at(clustering.iteration_stats.size() - 1).obj)

    on_card = torch.from_numpy(x).to(device)

    def theirs_on_the_card() -> None:
        kmeans(options.clusters, DatasetAssignGPU(resources, on_card), ITERATIONS + 1, verbose=False)
        torch.cuda.synchronize()

    runs: dict[str, Any] = {"sslscale": ours, "faiss": theirs, "faiss, rows on the card": theirs_on_the_card}
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError:
        print("flash-kmeans is not installed")
    else:

        def flash() -> None:
            batch_kmeans_Euclid(on_card[None], options.clusters, max_iters=ITERATIONS + 1, tol=-1)
            torch.cuda.synchronize()

        runs["flash-kmeans"] = flash
    seconds = interleave(runs, options.repeats)
    flops = 2.0 * options.rows * options.dim * options.clusters * (ITERATIONS + 1)
    write_result(
        "cluster-gpu",
        {
            "settings": vars(options),
            "iterations": ITERATIONS,
            "seconds": seconds,
            "objective": {"sslscale": ours(), "faiss": theirs()},
            "ratio_to_faiss": min(seconds["faiss"], seconds["faiss, rows on the card"]) / seconds["sslscale"],
            "required": 1.0,
            "share_of_the_matrix_rate": flops / seconds["sslscale"] / matrix_rate(device),
        },
    )


if __name__ == "__main__":
    main()
