"""Compression by faiss, measured: bytes a vector, what a vector loses, and which neighbours survive."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from sslscale.index.exact import ArrayReference, exact_knn

K = 10


def codecs(dim: int, code_bytes: list[int], pca_dims: list[int]) -> dict[str, str]:
    """Name -> faiss factory string, for what fits `dim` dimensions; RaBitQ keeps one bit a dimension."""
    named = {"fp16": "SQfp16", "SQ8": "SQ8"}
    named |= {f"PCA{kept}": f"PCA{kept},Flat" for kept in pca_dims if kept < dim}
    for size in code_bytes:
        rotated = -(-dim // size) * size  # OPQ's output is a multiple of the sub-quantizers
        named[f"OPQ+PQ{size}"] = f"OPQ{size}_{rotated},PQ{size}"
    return {**named, "RaBitQ": f"RR{dim},RaBitQ"}


def empty_codec(factory: str, dim: int) -> faiss.Index:
    """The codec that a factory string names.

    faiss's PCA subtracts the mean and, on the way back, adds only what of it lies in the subspace that was kept: the
    rows are centred before it.
    """
    codec = faiss.index_factory(dim, factory)
    if factory.startswith("PCA"):
        centring = faiss.CenteringTransform(dim)
        centring.this.disown()  # the codec frees its transforms itself
        codec.prepend_transform(centring)
    return codec


def measure(codec: faiss.Index, x: np.ndarray, at: np.ndarray, truth: np.ndarray, candidates: int) -> dict[str, Any]:
    """One line of the table, for a trained and empty `codec`, on rows x (N, D) fp32 with queries x[at].

    `reconstruction_error` is sum ||x - decoded||^2 / sum ||x - mean||^2. `recall_at_10` is the share of `truth`
    (n, k), the exact neighbours without the query itself, among the k nearest by code; `recall_at_10_reranked` ranks
    the nearest `candidates` by code again by their exact distance.
    """
    codes = codec.sa_encode(x)
    squared = ((x - codec.sa_decode(codes)) ** 2).sum(dtype=np.float64)
    variance = ((x - x.mean(axis=0)) ** 2).sum(dtype=np.float64)
    codec.add(x)
    k = truth.shape[1]
    found = codec.search(x[at], min(max(candidates, k) + 1, len(x)))[1]
    codec.reset()
    others = [ids[(ids != own) & (ids >= 0)] for ids, own in zip(found, at, strict=True)]
    again = [
        ids[np.argsort(((x[ids] - x[own]) ** 2).sum(axis=1), kind="stable")]
        for ids, own in zip((ids[:candidates] for ids in others), at, strict=True)
    ]
    return {
        "bytes_per_vector": codes.shape[1],
        "reconstruction_error": float(squared / variance) if variance else 0.0,
        "recall_at_10": _recall(others, truth, k),
        "recall_at_10_reranked": _recall(again, truth, k),
    }


def neighbours(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The exact 10 nearest other rows (or all N - 1) of each of x[at]: int64 (n, k)."""
    return exact_knn(x[at], at, ArrayReference(x), min(K, len(x) - 1), "l2")[1]


def _recall(found: list[np.ndarray], truth: np.ndarray, k: int) -> float:
    return float(np.mean([len(np.intersect1d(ids[:k], own)) for ids, own in zip(found, truth, strict=True)]) / k)
