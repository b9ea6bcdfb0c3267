"""Which index for how many vectors, how much memory it takes, and about how long it is built."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import numpy as np

from sslscale.config import IndexConfig
from sslscale.errors import UserError
from sslscale.index.factory import bytes_per_vector, can_merge, empty_index, fixed_bytes, inverted_lists, is_streamable

SCAN_PRODUCTS = 2**25  # multiply-adds of an exact scan that still answers in a few milliseconds on one core
TRAIN_PER_LIST = 64  # rows a list's centroid is trained on: more move the recall at an nprobe by less than a percent
GRAPH_LISTS = 2**16  # from so many centroids on, a graph over them finds the nearest faster than comparing all
KMEANS_ITERATIONS = 10  # of faiss, for the lists' centroids
FINE_RECALL = 0.97  # what eight bits a dimension can tell


@dataclass(frozen=True)
class IndexPlan:
    """A factory string and what it costs: bytes of memory in all, rows to train on, rows that one worker indexes."""

    factory: str
    bytes: int
    train_rows: int
    shard_rows: int

    def announce(self, num_vectors: int, dim: int) -> None:
        """Says on stderr what is about to be built; the time is from a short measurement of this machine."""
        lists = inverted_lists(empty_index(self.factory, dim))
        products = 0 if lists is None else lists.nlist * dim * (KMEANS_ITERATIONS * self.train_rows + num_vectors)
        seconds = products / _products_per_second() + num_vectors * dim / 1e8
        print(
            f"index: {self.factory} for {num_vectors:,} x {dim}: {self.bytes / 2**20:,.0f} MiB, about {seconds:,.0f} s",
            file=sys.stderr,
            flush=True,
        )


def plan_index(settings: IndexConfig, num_vectors: int, dim: int) -> IndexPlan:
    """UserError for a string that faiss does not know, that does not fit the memory, the layout or the rows."""
    if not num_vectors:
        raise UserError("the features have no rows to index")
    factory = settings.factory
    if factory == "auto":
        factory = choose_factory(
            num_vectors, dim, settings.memory_gb, settings.wanted_recall, on_disk=settings.layout == "on_disk"
        )
    index = empty_index(factory, dim)
    needed = estimate_bytes(factory, num_vectors, dim)
    if settings.layout == "on_disk" and not is_streamable(index):
        raise UserError(
            "this index cannot lie on disk",
            got=factory,
            allowed="inverted lists of plain codes: IVF<n>,Flat or ,SQ8 or ,SQfp16 or ,PQ<m>, without fast scan",
            fix="set index.factory=auto, or index.layout to merged or sharded",
        )
    budget = _budget(settings.memory_gb)
    if settings.layout != "on_disk" and needed > budget:
        raise _too_large(factory, needed, budget)
    lists = inverted_lists(index)
    rows = max(TRAIN_PER_LIST * lists.nlist, 65536) if lists is not None else 65536
    train_rows = min(settings.train_rows or rows, num_vectors, budget // (16 * dim))  # a quarter of the memory
    if lists is not None and lists.nlist > train_rows:
        raise UserError(
            "the index has more lists than vectors to train them on",
            got=f"{factory!r} with {train_rows} vectors",
            allowed=f"at most {train_rows} lists",
            fix="set index.factory to auto, or raise index.train_rows",
        )
    shard_rows = min(settings.shard_rows, int(budget / 8 / bytes_per_vector(index)) + 1)
    if settings.layout != "sharded" and not can_merge(index):
        shard_rows = sys.maxsize  # what is built apart could not be put together
    return IndexPlan(factory, needed, train_rows, shard_rows)


def choose_factory(
    num_vectors: int, dim: int, memory_gb: float | None, wanted_recall: float, *, on_disk: bool = False
) -> str:
    """The faiss factory string for so many vectors of so many dimensions.

    Exact (Flat) while a scan is cheap. Then about 2 sqrt(N) inverted lists whose 4-bit codes are scanned in registers
    (Andre et al., 2015, "Cache locality is not enough"; faiss's PQ fast scan), and whose candidates are ranked again
    by 16 or, under a tight `memory_gb`, 8 bits a dimension. A random rotation before it (Jegou et al., 2010,
    "Aggregating local descriptors into a compact image representation") spreads the variance over all codes alike:
    half as many candidates do where a few directions hold most of it. On disk: plain fp16 codes, in twice as many
    lists.
    UserError where nothing that reaches `wanted_recall` fits.
    """
    root = math.sqrt(num_vectors)
    if on_disk:
        return f"{_lists(4 * root, num_vectors)},SQfp16"
    if num_vectors * dim <= SCAN_PRODUCTS:
        return "Flat"
    even = dim + dim % 2
    ranks = ["SQfp16", "SQ8"] if wanted_recall <= FINE_RECALL else ["SQfp16"]
    budget = _budget(memory_gb)
    for rank in ranks:
        factory = f"RR{even},{_lists(2 * root, num_vectors)},PQ{even // 2}x4fs,Refine({rank})"
        needed = estimate_bytes(factory, num_vectors, dim)
        if needed <= budget:
            return factory
    raise _too_large(factory, needed, budget)


def _lists(wanted: float, num_vectors: int) -> str:
    lists = min(2 ** round(math.log2(wanted)), num_vectors)
    return f"IVF{lists}_HNSW32" if lists >= GRAPH_LISTS else f"IVF{lists}"


def estimate_bytes(factory: str, num_vectors: int, dim: int) -> int:
    """Memory of an index with so many vectors: codes, ids, graphs, and the lists' centroids."""
    index = empty_index(factory, dim)
    return round(num_vectors * bytes_per_vector(index)) + fixed_bytes(index)


def _budget(memory_gb: float | None) -> int:
    """Bytes."""
    return sys.maxsize if memory_gb is None else int(memory_gb * 1e9)


def _too_large(factory: str, needed: int, budget: int) -> UserError:
    return UserError(
        "the index does not fit into memory",
        got=f"{factory}: {needed / 1e9:.2f} GB",
        allowed=f"{budget / 1e9:.2f} GB (index.memory_gb)",
        fix="raise it, set index.layout=on_disk, or name a smaller index.factory",
    )


def _products_per_second() -> float:
    """Multiply-adds a second of this process's threads in a product like that of rows with centroids."""
    x, y = np.ones((4096, 128), np.float32), np.ones((128, 1024), np.float32)
    x @ y
    start = time.perf_counter()
    x @ y
    return 4096 * 128 * 1024 / (time.perf_counter() - start)
