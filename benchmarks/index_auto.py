"""What `index.factory=auto` chooses against five factory strings that were picked by hand, at 1M x 128.

The data and the strings stand here before `auto` was written, so that it could not be made for them.

`features`: HOG features of Fashion-MNIST, projected to their 128 leading directions and expanded by noise.
`mixture`: Gaussian clusters of very different sizes, each with its own shape and few directions.
`surface`: a smooth, curved surface of 12 dimensions, without clusters.

    python benchmarks/index_auto.py --data surface [--rows 1000000] [--threads 2] [--rounds 5]

Queries a second at recall@10 >= 0.95 of every string by plain faiss calls: the effort (nprobe, efSearch, k_factor) is
tuned in the same way on one half of the queries, recall and time are those of the other half. `auto` is its string
among them. Then `sslscale index` and `Index.search` against plain faiss calls with that string: from features on disk
to a file, and from queries to neighbours. `faiss` trains on what it takes of all rows by itself (256 a list),
`faiss_same_sample` on as many rows as ours. All take turns; medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import interleave, matrix_rate, write_result, write_store

from sslscale.config import IndexConfig, RunConfig
from sslscale.index import Index
from sslscale.index.build import run_index
from sslscale.index.factory import Effort, inverted_lists, search_parameters, starting_effort
from sslscale.index.plan import plan_index
from sslscale.index.tune import tune
from sslscale.models.handcrafted import HOG
from sslscale.rundir import RunDir
from sslscale.runtime.base import compute_threads, make_runtime
from sslscale.shards.sources.fashion_mnist import FashionMNIST

DIM = 128
HAND_PICKED = ("IVF1024,Flat", "IVF4096,Flat", "IVF4096,SQ8", "IVF4096,PQ64x4fs,RFlat", "HNSW32")


def features(rows: int, seed: int) -> np.ndarray:
    """(rows, 128) fp32 of unit length; noise of half the spread of each direction keeps copies of an image apart."""
    import torch

    pixels = FashionMNIST().data["train"][0][:, None]
    hog = HOG(1, 28)
    batches = (torch.from_numpy(pixels[at : at + 4096] / np.float32(255)) for at in range(0, len(pixels), 4096))
    known = np.concatenate([hog(batch).numpy() for batch in batches])
    known -= known.mean(axis=0)
    variances, directions = np.linalg.eigh(known.T @ known / len(known))
    known, spread = known @ directions[:, -DIM:], np.sqrt(variances[-DIM:]).astype(np.float32)
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, DIM), dtype=np.float32) * (spread / 2)
    x += known[generator.integers(0, len(known), rows)]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mixture(rows: int, seed: int) -> np.ndarray:
    """(rows, 128) fp32: 5,000 clusters whose sizes fall as 1 / rank, each spread along 24 directions of its own."""
    shape = np.random.default_rng(2**20)  # the clusters are the same for every seed: queries come from them too
    clusters, rank = 5000, 24
    centres = shape.standard_normal((clusters, DIM), dtype=np.float32)
    directions = shape.standard_normal((64, rank, DIM), dtype=np.float32) / np.sqrt(rank)
    kind, scale = shape.integers(0, 64, clusters), shape.uniform(0.5, 2, clusters).astype(np.float32)
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, clusters + 1)
    own = generator.choice(clusters, rows, p=weights / weights.sum())
    x = centres[own] + generator.standard_normal((rows, DIM), dtype=np.float32) * 0.05
    for one in range(64):
        here = np.flatnonzero(kind[own] == one)
        latent = generator.standard_normal((len(here), rank), dtype=np.float32) * scale[own[here], None]
        x[here] += latent @ directions[one]
    return x


def surface(rows: int, seed: int) -> np.ndarray:
    """(rows, 128) fp32: 12 uniform coordinates through a fixed random layer of sines, with a little noise."""
    shape = np.random.default_rng(2**21)
    first = shape.standard_normal((12, 256), dtype=np.float32)
    phase = shape.uniform(0, 2 * np.pi, 256).astype(np.float32)
    second = shape.standard_normal((256, DIM), dtype=np.float32) / 16
    generator = np.random.default_rng(seed)
    x = np.sin(generator.random((rows, 12), dtype=np.float32) @ first + phase) @ second
    return x + generator.standard_normal((rows, DIM), dtype=np.float32) * np.float32(0.02)


DATA = {"features": features, "mixture": mixture, "surface": surface}
K, WANTED = 10, 0.95


def built(factory: str, x: np.ndarray, train_rows: int | None = None) -> faiss.Index:
    index = faiss.index_factory(DIM, factory)
    index.train(x if train_rows is None else x[np.random.default_rng(0).permutation(len(x))[:train_rows]])
    index.add(x)
    return index


def tuned_effort(index: faiss.Index, queries: np.ndarray, truth: np.ndarray) -> Effort:
    lists = inverted_lists(index)
    start = starting_effort(index)
    limits = Effort(lists.nlist if lists is not None else None, start.ef_search and 4096, start.k_factor)
    scanned = 0.0 if lists is None else index.ntotal / lists.nlist * lists.code_size
    return tune(lambda effort: recall(search(index, queries, effort), truth), start, limits, WANTED, scanned).effort


def search(index: faiss.Index, queries: np.ndarray, effort: Effort) -> np.ndarray:
    return index.search(queries, K, params=search_parameters(index, effort))[1]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float((truth[:, :, None] == found[:, None, :]).any(axis=2).mean())


def compare_strings(x: np.ndarray, queries: np.ndarray, auto: str, rounds: int) -> dict[str, Any]:
    """Queries a second of `auto` and of the strings picked by hand, tuned alike."""
    truth = faiss.knn(queries, x, K)[1]
    half = len(queries) // 2
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for factory in dict.fromkeys((auto, *HAND_PICKED)):
        start = time.perf_counter()
        index = built(factory, x, plan_index(IndexConfig(factory=factory), len(x), DIM).train_rows)
        seconds = time.perf_counter() - start
        effort = tuned_effort(index, queries[:half], truth[:half])
        rows[factory] = {
            "build_seconds": round(seconds, 1),
            "effort": {name: value for name, value in vars(effort).items() if value},
            "recall_at_10": round(recall(search(index, queries[half:], effort), truth[half:]), 4),
        }
        runs[factory] = lambda index=index, effort=effort: search(index, queries[half:], effort)
        print(factory, rows[factory], flush=True)
    for factory, seconds in interleave(runs, rounds).items():
        rows[factory]["queries_per_second"] = round((len(queries) - half) / seconds)
    best = max(rows[factory]["queries_per_second"] for factory in HAND_PICKED)
    return {"strings": rows, "auto": auto, "auto_over_best": round(rows[auto]["queries_per_second"] / best, 3)}


def compare_with_faiss(x: np.ndarray, queries: np.ndarray, threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Building and searching by sslscale against plain faiss calls with the same string."""
    write_store(folder, x)
    config = RunConfig.model_validate(
        {
            "index": {"metric": "l2", "recall_queries": 200},
            "runtime": {"name": "local", "workers": 1, "threads": threads},
        }
    )
    plan = plan_index(config.index, len(x), DIM)
    ours: list[float] = []

    def build_ours() -> None:
        with RunDir(folder) as run:
            result = run_index(run, config, make_runtime("local"), name=f"n{len(ours)}")
        ours.append(result["build_seconds"])  # without the measuring of recall

    def build_plain(train_rows: int | None) -> None:
        faiss.write_index(built(plan.factory, x, train_rows), str(folder / "plain.faiss"))

    seconds = interleave(
        {
            "sslscale": build_ours,
            "faiss": lambda: build_plain(None),
            "faiss_same_sample": lambda: build_plain(plan.train_rows),
        },
        rounds,
    )
    seconds["sslscale"] = float(np.median(ours[1:]))
    index = Index.open(folder, "n0")
    plain = faiss.read_index(str(folder / "index/n0/index.faiss"))
    searches = interleave(
        {
            "sslscale": lambda: index.search(queries, K),
            "faiss": lambda: plain.search(queries, K, params=search_parameters(plain, index.record.effort)),
        },
        max(rounds, 5),
    )
    return {
        "build_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "build_speed_over_faiss": round(seconds["faiss"] / seconds["sslscale"], 3),
        "build_speed_over_faiss_same_sample": round(seconds["faiss_same_sample"] / seconds["sslscale"], 3),
        "search_speed_over_faiss": round(searches["faiss"] / searches["sslscale"], 3),
        "recall_at_10": index.record.result["recall_at_10"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), default="surface")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build-rounds", type=int, default=3)
    parser.add_argument("--only", choices=["strings", "faiss"], help="one of the two comparisons")
    options = parser.parse_args()
    x, queries = DATA[options.data](options.rows, 1), DATA[options.data](options.queries, 2)
    gflops = matrix_rate(options.threads) / 1e9
    with compute_threads(options.threads):
        found: dict[str, Any] = {}
        if options.only != "faiss":
            auto = plan_index(IndexConfig(), len(x), DIM).factory
            found |= compare_strings(x, queries, auto, options.rounds)
        if options.only != "strings":
            with tempfile.TemporaryDirectory() as folder:
                found |= compare_with_faiss(x, queries, options.threads, options.build_rounds, Path(folder))
    settings = {"data": options.data, "rows": len(x), "dim": DIM, "threads": options.threads}
    part = f"-{options.only}" if options.only else ""
    write_result(f"index-auto-{options.data}{part}", {**settings, "sgemm_gflops": round(gflops, 1), **found})


if __name__ == "__main__":
    main()
