"""The two inner loops of k-means: which centroid is nearest, and what the rows of each centroid add up to.

N rows, D dimensions, K centroids, R restarts that share one pass over the rows.

Rows are read in blocks and centroids in tiles of fixed sizes, counted from the start of a part: the rounding of a row
depends on its part alone, never on how many workers there are or on which restarts still run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from sslscale.features.distance import prepare

if TYPE_CHECKING:
    from sslscale.cluster.tree import Tree

BLOCK_ROWS = 4096
TILE_ROWS, TILE_CENTROIDS = 512, 2048  # of the scores that are held at once: they fit the cache


def blocks(
    rows: np.ndarray, metric: str, sample: np.ndarray | slice = slice(None)
) -> Iterator[tuple[slice, np.ndarray]]:
    """`(slice, prepared rows)` over an array (n, D), which may be a memory map, or over its rows at `sample`.

    The slices count from the start of what is read.
    """
    count = len(rows) if isinstance(sample, slice) else len(sample)
    for start in range(0, count, BLOCK_ROWS):
        here = slice(start, min(start + BLOCK_ROWS, count))
        yield here, prepare(rows[here if isinstance(sample, slice) else sample[here]], metric)


class NearestCentroid:
    """Finds the centroid (K, D) with the least squared L2 distance to each of many rows; made once, used by block.

    ||x||^2 is the same for every centroid and left out: argmin of ||c||^2 - 2 x.c, as one product of [x, 1] with
    [-2 c, ||c||^2]. Where the centroids lie further from the origin than from each other, that difference would
    cancel in fp32: both sides are then taken relative to the centroids' mean.
    """

    def __init__(self, centroids: np.ndarray) -> None:
        norms = np.einsum("kd,kd->k", centroids, centroids)
        mean = centroids.mean(axis=0)
        self.shift = mean if mean @ mean > norms.mean() / 2 else None
        if self.shift is not None:
            centroids = centroids - mean
            norms = np.einsum("kd,kd->k", centroids, centroids)
        self.table = np.concatenate([-2 * centroids, norms[:, None]], axis=1).T.copy()  # (D + 1, K)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Labels int32 (n,) of rows (n, D), of the centroids' dtype. Ties go to the lowest index."""
        if self.shift is not None:
            x = x - self.shift
        x = np.concatenate([x, np.ones((len(x), 1), dtype=x.dtype)], axis=1)
        labels = np.zeros(len(x), dtype=np.int32)
        for begin in range(0, len(x), TILE_ROWS):
            rows = slice(begin, begin + TILE_ROWS)
            best = np.full(len(x[rows]), np.inf, dtype=x.dtype)
            for start in range(0, self.table.shape[1], TILE_CENTROIDS):
                scores = x[rows] @ self.table[:, start : start + TILE_CENTROIDS]
                nearest = scores.argmin(axis=1)
                score = np.take_along_axis(scores, nearest[:, None], axis=1)[:, 0]
                closer = score < best
                labels[rows][closer] = nearest[closer] + start
                best[closer] = score[closer]
        return labels


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest of centroids (K, D) to each row of x (n, D): int32 (n,). See NearestCentroid."""
    return NearestCentroid(centroids.astype(x.dtype, copy=False))(x)


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
    squares: np.ndarray  # (R,) float64, sum of w ||x||^2 over all rows

    @classmethod
    def zero(cls, centroids: np.ndarray) -> Totals:
        return cls(np.zeros(centroids.shape), np.zeros(centroids.shape[:2]), np.zeros(len(centroids)))

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


@dataclass
class Pass:
    """What one pass over the rows asks for: centroids of R restarts, how many rows each looks at, and how closely.

    Where a restart has a tree of its centroids, one that is about as near as the nearest will do.
    """

    centroids: np.ndarray  # (R, K, D)
    shares: np.ndarray  # (R,), the share of the rows that counts; smaller samples are part of larger ones
    trees: Sequence[Tree | None]  # R

    @classmethod
    def of(cls, centroids: np.ndarray, share: float = 1.0) -> Pass:
        """Exact, of the same share for all."""
        return cls(centroids, np.full(len(centroids), share), [None] * len(centroids))


def nested_sample(num_rows: int, share: float, seed: int | Sequence[int]) -> np.ndarray | slice:
    """The first ceil(share num_rows) of a random permutation, ascending; all of them for a share of 1."""
    if share == 1:
        return slice(None)
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[: math.ceil(share * num_rows)])


def accumulate(
    rows: np.ndarray, metric: str, wanted: Pass, weights: np.ndarray | None = None, seed: int | Sequence[int] = 0
) -> Totals:
    """Assigns rows (n, D), read in blocks, and adds them up; `weights` is (n,) or None for 1; `seed` draws samples."""
    totals = Totals.zero(wanted.centroids)
    for share in np.unique(wanted.shares):
        sample = nested_sample(len(rows), share, seed)
        restarts = np.flatnonzero(wanted.shares == share)
        own = None if weights is None else weights[sample]
        dtype = np.result_type(rows.dtype, np.float32)
        exact = [restart for restart in restarts.tolist() if wanted.trees[restart] is None]
        find = {r: NearestCentroid(wanted.centroids[r].astype(dtype, copy=False)) for r in exact}
        for here, x in blocks(rows, metric, sample) if exact else ():
            x64, w = x.astype(np.float64), np.ones(len(x)) if own is None else own[here]
            totals.squares[exact] += squared_norm(x64, w)
            for restart, nearest in find.items():
                add_rows(nearest(x), x64, w, totals.sums[restart], totals.counts[restart])
        for restart in restarts.tolist():
            tree = wanted.trees[restart]
            for at, x, labels in tree.assign(rows, metric, wanted.centroids[restart], sample) if tree else ():
                x64, w = x.astype(np.float64), np.ones(len(x)) if own is None else own[at]
                totals.squares[restart] += squared_norm(x64, w)
                add_rows(labels, x64, w, totals.sums[restart], totals.counts[restart])
    return totals


def squared_norm(x: np.ndarray, weights: np.ndarray) -> float:
    """Sum of w ||x||^2 of rows (n, D) in float64."""
    return float(weights @ np.einsum("nd,nd->n", x, x))


def add_rows(labels: np.ndarray, x: np.ndarray, weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """Adds rows (n, D) times their weights (n,) to the sums (K, D) of their labels, and the weights to counts (K,)."""
    present, at = np.unique(labels, return_inverse=True)  # of many clusters, a block touches few
    members = csr_matrix((weights, (at, np.arange(len(x)))), shape=(len(present), len(x)))
    sums[present] += members @ x
    counts[present] += np.bincount(at, weights=weights)


@dataclass
class Farthest:
    """Rows that are far from their centroid, with the keys that put them in order, highest first."""

    keys: np.ndarray  # (m,) float64
    squared: np.ndarray  # (m,) float64
    labels: np.ndarray  # (m,) int32
    rows: np.ndarray  # (m, D), prepared
    weights: np.ndarray  # (m,) float64

    @classmethod
    def merge(cls, found: Iterable[Farthest], count: int) -> Farthest:
        """The `count` highest of several, each in this order; ties go to the earlier one. Two are held at a time."""

        def higher(one: Farthest, other: Farthest) -> Farthest:
            pairs = zip(vars(one).values(), vars(other).values(), strict=True)
            columns = [np.concatenate(pair) for pair in pairs]
            order = np.argsort(-columns[0], kind="stable")[:count]
            return cls(*(column[order] for column in columns))

        return reduce(higher, found)


def farthest(
    rows: np.ndarray,
    metric: str,
    wanted: Pass,
    count: int,
    weights: np.ndarray | None = None,
    seed: int | Sequence[int] = 0,
) -> Farthest:
    """The `count` rows of (n, D) that are farthest from their centroid, for the one restart of `wanted`."""
    none = np.empty(0)
    dtype = np.result_type(rows.dtype, np.float32)
    found = Farthest(none, none, np.empty(0, np.int32), np.empty((0, rows.shape[1]), dtype), none)
    sample = nested_sample(len(rows), float(wanted.shares[0]), seed)
    own = None if weights is None else weights[sample]
    find = NearestCentroid(wanted.centroids[0].astype(dtype, copy=False))
    for here, x in blocks(rows, metric, sample):
        labels = find(x)
        w = np.ones(len(x)) if own is None else own[here]
        squared = squared_distances(x, wanted.centroids[0], labels)
        found = Farthest.merge([found, Farthest(squared, squared, labels, x, w)], count)
    return found
