"""Exact k nearest neighbours of queries among reference rows that are read in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import faiss
import numpy as np

from sslscale.features import FeatureSet
from sslscale.features.distance import prepare, to_distance

BLOCK_ROWS = 65536  # of the reference
QUERY_ROWS = 4096  # that one pass over the reference answers
RESCORE_BYTES = 2**27  # of the candidates' rows that are held to be compared again


class Reference(Protocol):
    """Rows with ids, read in blocks of at most BLOCK_ROWS."""

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`(ids (n,), rows (n, D))`."""
        ...

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The rows (n, D) with these ids."""
        ...


class SetReference:
    """The rows of a feature set, with their row ids."""

    def __init__(self, features: FeatureSet) -> None:
        self.take = features.take
        self._features = features

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in self._features.parts:
            for start in range(0, part.rows, BLOCK_ROWS):
                rows = self._features.block(part.number, start, start + BLOCK_ROWS)
                yield (part.number << 32) + np.arange(start, start + len(rows)), rows


class RowReference:
    """Some rows of a feature set: those whose row ids `batches()` yields, in arrays of at most BLOCK_ROWS."""

    def __init__(self, features: FeatureSet, batches: Callable[[], Iterator[np.ndarray]]) -> None:
        self.take = features.take
        self._batches = batches

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((ids, self.take(ids)) for ids in self._batches())


class ArrayReference:
    """The rows of an array (N, D), with their indices."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.x), BLOCK_ROWS):
            rows = self.x[start : start + BLOCK_ROWS]
            yield np.arange(start, start + len(rows)), rows

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self.x[ids]


def exact_knn(
    queries: np.ndarray, own_ids: np.ndarray, reference: Reference, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (fp32) and ids (int64) of the k nearest reference rows of each query, both (n, k), nearest first.

    `own_ids` (n,) is each query's own id in the reference, or -1: that row is left out by its id, so duplicates
    of it stay. The reference must have k rows besides it. Distances come from the differences themselves, so equal
    vectors are at 0; equal distances are ordered by id.
    """
    distances = np.empty((len(queries), k), dtype=np.float32)
    ids = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), QUERY_ROWS):
        here = slice(start, start + QUERY_ROWS)
        x = np.ascontiguousarray(prepare(queries[here], metric), dtype=np.float32)
        found = _scan(x, reference, k + 1, metric)
        distances[here], ids[here] = rescore(x, found, own_ids[here], reference, k, metric)
    return distances, ids


def _scan(x: np.ndarray, reference: Reference, k: int, metric: str) -> np.ndarray:
    """Ids (n, k) of the nearest rows by faiss's squared L2, own rows included."""
    best = np.empty((len(x), 0), dtype=np.float32)
    ids = np.empty((len(x), 0), dtype=np.int64)
    for block_ids, rows in reference.blocks():
        block = np.ascontiguousarray(prepare(rows, metric), dtype=np.float32)
        squared, at = faiss.knn(x, block, min(k, len(block)))
        best = np.concatenate([best, squared], axis=1)
        ids = np.concatenate([ids, block_ids[at]], axis=1)
        order = np.lexsort((ids, best), axis=1)[:, :k]
        best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    return ids


def rescore(
    x: np.ndarray, ids: np.ndarray, own_ids: np.ndarray, reference: Reference, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of candidates (n, k or k + 1), the k nearest other than the own row, by distances without cancellation."""
    queries = max(1, RESCORE_BYTES // (np.dtype(np.float32).itemsize * ids.shape[1] * x.shape[1]))
    if len(x) > queries:
        pieces = [slice(start, start + queries) for start in range(0, len(x), queries)]
        found = [rescore(x[own], ids[own], own_ids[own], reference, k, metric) for own in pieces]
        distances, ids = (np.concatenate(of) for of in zip(*found, strict=True))
        return distances, ids
    rows = prepare(reference.take(ids.ravel()), metric).reshape(*ids.shape, -1)
    difference = rows - x[:, None]
    squared = np.einsum("nkd,nkd->nk", difference, difference)
    squared[ids == own_ids[:, None]] = np.inf
    order = np.lexsort((ids, squared), axis=1)[:, :k]
    squared, ids = np.take_along_axis(squared, order, 1), np.take_along_axis(ids, order, 1)
    return to_distance(squared, metric).astype(np.float32), ids


def row_distances(x: np.ndarray, rows: np.ndarray, metric: str) -> np.ndarray:
    """(n,) fp32: of each row of x (n, D) from the same row of rows (n, D), both prepared."""
    difference = rows - x
    return to_distance(np.einsum("nd,nd->n", difference, difference), metric).astype(np.float32)
