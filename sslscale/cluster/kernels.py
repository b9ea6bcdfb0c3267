"""The two inner loops of k-means: which centroid is nearest, and what the rows of each centroid add up to.

N rows, D dimensions, K centroids, R restarts that share one pass over the rows.

Rows are read in blocks and centroids in tiles of fixed sizes, counted from the start of a part: the rounding of a row
depends on its part alone, never on how many workers there are or on which restarts still run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from sslscale.features.distance import prepare

BLOCK_ROWS = 4096
TILE_CENTROIDS = 4096


def blocks(rows: np.ndarray, metric: str) -> Iterator[tuple[slice, np.ndarray]]:
    """`(slice, prepared rows)` over an array (n, D), which may be a memory map."""
    for start in range(0, len(rows), BLOCK_ROWS):
        here = slice(start, min(start + BLOCK_ROWS, len(rows)))
        yield here, prepare(rows[here], metric)


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The index of the centroid (K, D) with the least squared L2 distance to each row of x (n, D): int32 (n,).

    ||x||^2 is the same for every centroid and left out: argmin of ||c||^2 - 2 x.c. Ties go to the lowest index.
    Where the centroids lie further from the origin than from each other, that difference would cancel in fp32: both
    sides are then taken relative to the centroids' mean.
    """
    best = np.full(len(x), np.inf, dtype=x.dtype)
    labels = np.zeros(len(x), dtype=np.int32)
    centroids = centroids.astype(x.dtype, copy=False)
    norms = np.einsum("kd,kd->k", centroids, centroids)
    mean = centroids.mean(axis=0)
    if mean @ mean > norms.mean() / 2:
        x, centroids = x - mean, centroids - mean
        norms = np.einsum("kd,kd->k", centroids, centroids)
    for start in range(0, len(centroids), TILE_CENTROIDS):
        tile = slice(start, start + TILE_CENTROIDS)
        scores = x @ centroids[tile].T
        scores *= -2
        scores += norms[tile]
        nearest = scores.argmin(axis=1)
        score = np.take_along_axis(scores, nearest[:, None], axis=1)[:, 0]
        closer = score < best
        labels[closer] = nearest[closer] + start
        best[closer] = score[closer]
    return labels


def squared_distances(x: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """||x_i - c_label(i)||^2, float64 (n,), from the differences themselves: no cancellation, 0 for equal vectors."""
    difference = x.astype(np.float64) - centroids[labels]
    return np.einsum("nd,nd->n", difference, difference)


@dataclass
class Totals:
    """What an iteration needs to know of any set of rows; totals of disjoint sets add up.

    For fp16 rows under "l2" the float64 sums are exact in any order (while the magnitudes sum to less than 2^29).
    """

    sums: np.ndarray  # (R, K, D) float64, sum of w x over the rows of each centroid
    counts: np.ndarray  # (R, K) float64, sum of w
    squares: float  # sum of w ||x||^2 over all rows

    @classmethod
    def zero(cls, centroids: np.ndarray) -> Totals:
        return cls(np.zeros(centroids.shape), np.zeros(centroids.shape[:2]), 0.0)

    def add(self, other: Totals) -> None:
        self.sums += other.sums
        self.counts += other.counts
        self.squares += other.squares

    def objective(self, centroids: np.ndarray) -> np.ndarray:
        """Sum of w ||x - c||^2 for the centroids (R, K, D) that the rows were assigned to: float64 (R,).

        Equal to squares - 2 sum_k c_k.sums_k + sum_k counts_k ||c_k||^2, so no second pass over the rows.
        """
        c = centroids.astype(np.float64)
        cross = np.einsum("rkd,rkd->r", c, self.sums)
        norms = np.einsum("rkd,rkd->rk", c, c)
        return np.maximum(self.squares - 2 * cross + (self.counts * norms).sum(axis=1), 0)


def accumulate(rows: np.ndarray, metric: str, centroids: np.ndarray, weights: np.ndarray | None = None) -> Totals:
    """Assigns rows (n, D), read in blocks, to centroids (R, K, D) and adds them up; `weights` is (n,) or None for 1."""
    totals = Totals.zero(centroids)
    num_clusters = centroids.shape[1]
    for here, x in blocks(rows, metric):
        x64 = x.astype(np.float64)
        w = np.ones(len(x)) if weights is None else weights[here]
        totals.squares += float(w @ np.einsum("nd,nd->n", x64, x64))
        for restart, own in enumerate(centroids):
            labels = nearest_centroid(x, own)
            members = csr_matrix((w, (labels, np.arange(len(x)))), shape=(num_clusters, len(x)))
            totals.sums[restart] += members @ x64
            totals.counts[restart] += np.bincount(labels, weights=w, minlength=num_clusters)
    return totals


@dataclass
class Farthest:
    """Rows far from their centroid, farthest first."""

    squared: np.ndarray  # (m,) float64
    labels: np.ndarray  # (m,) int32
    rows: np.ndarray  # (m, D), prepared
    weights: np.ndarray  # (m,) float64

    @classmethod
    def merge(cls, found: Iterable[Farthest], count: int) -> Farthest:
        """The `count` farthest of several; ties go to the earlier one."""
        columns = zip(*((part.squared, part.labels, part.rows, part.weights) for part in found), strict=True)
        squared, labels, rows, weights = (np.concatenate(column) for column in columns)
        order = np.argsort(-squared, kind="stable")[:count]
        return cls(squared[order], labels[order], rows[order], weights[order])


def farthest(
    rows: np.ndarray, metric: str, centroids: np.ndarray, count: int, weights: np.ndarray | None = None
) -> Farthest:
    """The `count` rows of (n, D) that are farthest from the nearest of centroids (K, D)."""
    dtype = np.result_type(rows.dtype, np.float32)
    found = Farthest(np.empty(0), np.empty(0, np.int32), np.empty((0, rows.shape[1]), dtype), np.empty(0))
    for here, x in blocks(rows, metric):
        labels = nearest_centroid(x, centroids)
        w = np.ones(len(x)) if weights is None else weights[here]
        found = Farthest.merge([found, Farthest(squared_distances(x, centroids, labels), labels, x, w)], count)
    return found
