"""Which index for how many vectors, and how much memory it takes."""

from __future__ import annotations

import math
import re

SCAN_PRODUCTS = 2**25  # multiply-adds of an exact scan that still answers in a few milliseconds on one core


def choose_factory(num_vectors: int, dim: int) -> str:
    """The faiss factory string for so many vectors of so many dimensions, the same for both metrics.

    Exact (Flat) while a scan is cheap, then inverted lists sized as the faiss wiki advises
    (https://github.com/facebookresearch/faiss/wiki/Guidelines-to-choose-an-index): about 4 sqrt(N) lists below a
    million, then 2^16, 2^18 and 2^20 with an HNSW over the list centroids. From a million on vectors are kept as fp16.
    """
    if num_vectors * dim <= SCAN_PRODUCTS:
        return "Flat"
    if num_vectors < 1_000_000:
        return f"IVF{2 ** round(math.log2(4 * math.sqrt(num_vectors)))},Flat"
    for limit, lists in ((10_000_000, 2**16), (100_000_000, 2**18)):
        if num_vectors < limit:
            return f"IVF{lists}_HNSW32,SQfp16"
    return f"IVF{2**20}_HNSW32,SQfp16"


def estimate_bytes(factory: str, num_vectors: int, dim: int) -> int:
    """Memory of an index that `choose_factory` named: codes, ids, and the lists' centroids with their graph."""
    per_vector = (2 if factory.endswith("SQfp16") else 4) * dim + 8
    lists = re.match(r"IVF(\d+)(_HNSW32)?", factory)
    if lists is None:
        return num_vectors * (per_vector + 8)  # IDMap2 keeps the ids both ways
    per_list = 4 * dim + (2 * 32 * 4 if lists[2] else 0)
    return num_vectors * per_vector + int(lists[1]) * per_list
