"""The two inner loops of k-means: which centroid is nearest, and what the rows of each centroid add up to.

N rows, D dimensions, K centroids, R restarts that share one pass over the rows.

Rows are read in blocks and centroids in tiles of fixed sizes, counted from the start of a part: the rounding of a row
depends on its part alone, never on how many workers there are or on which restarts still run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from sslscale.features.distance import prepare

BLOCK_ROWS = 4096
TILE_ROWS, TILE_CENTROIDS = 512, 2048  # of the scores that are held at once: they fit the cache
RANK_STEP = 32
NEIGHBOURS = 32  # centroids that a row is compared with in full, around the one that its projection finds


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


def principal_basis(centroids: np.ndarray, energy: float) -> np.ndarray | None:
    """The leading principal directions of the centroids (K, D) that hold `energy` of their variance: (D, p) or None.

    p is a multiple of RANK_STEP. None where more than half the dimensions would be needed: then the full product is
    as fast.
    """
    centred = centroids.astype(np.float64) - centroids.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    held = np.cumsum(values[::-1]) / max(values.sum(), np.finfo(float).tiny)
    rank = -(-(int(np.searchsorted(held, energy)) + 1) // RANK_STEP) * RANK_STEP
    return None if 2 * rank > len(values) else vectors[:, : -rank - 1 : -1].astype(centroids.dtype)


@dataclass(frozen=True)
class Shortcut:
    """A way to a row's nearest centroid that compares it with few of the K in full: those around a first guess.

    Of k^2-means (Agustsson, Timofte and Van Gool, 2017, https://arxiv.org/abs/1605.09299) but without memory: the
    guess is the nearest by projections, not the last iteration's, so that a pass depends on the centroids alone.
    """

    basis: np.ndarray  # (D, p)
    near: np.ndarray  # int64 (K, L), each centroid's nearest with itself, ascending

    @classmethod
    def of(cls, centroids: np.ndarray, energy: float) -> Shortcut | None:
        """By projections that hold `energy` of the variance of the centroids (K, D); None where they do not pay."""
        basis = principal_basis(centroids, energy)
        return None if basis is None else cls(basis, _neighbours(centroids, min(NEIGHBOURS, len(centroids))))

    def labels(
        self, rows: np.ndarray, metric: str, centroids: np.ndarray, sample: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """int32 labels of the rows (n, D) at `sample`: all but always the nearest of centroids (K, D)."""
        find = NearestCentroid(centroids, self.basis)
        guesses = np.concatenate([find(x) for _, x in blocks(rows, metric, sample)])
        at = np.arange(len(rows)) if isinstance(sample, slice) else sample
        mean = centroids.mean(axis=0)
        centred = centroids - mean
        half_norms = np.einsum("kd,kd->k", centred, centred) / 2
        labels = np.empty_like(guesses)
        order = np.argsort(guesses, kind="stable")
        starts = np.searchsorted(guesses[order], np.arange(len(centroids) + 1))
        for guess in np.flatnonzero(np.diff(starts)).tolist():
            own, candidates = order[starts[guess] : starts[guess + 1]], self.near[guess]
            x = prepare(rows[at[own]], metric) - mean
            scores = half_norms[candidates] - x @ centred[candidates].T
            labels[own] = candidates[scores.argmin(axis=1)]
        return labels


def _neighbours(centroids: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest of centroids (K, D) to each of them: int64 (K, count), ascending."""
    centred = centroids - centroids.mean(axis=0)
    half_norms = np.einsum("kd,kd->k", centred, centred) / 2
    near = np.empty((len(centroids), count), dtype=np.int64)
    for start in range(0, len(centroids), TILE_ROWS):
        scores = half_norms - centred[start : start + TILE_ROWS] @ centred.T
        near[start : start + TILE_ROWS] = np.argpartition(scores, count - 1, axis=1)[:, :count]
    return np.sort(near, axis=1)


class NearestCentroid:
    """Finds the centroid (K, D) with the least squared L2 distance to each of many rows; made once, used by block.

    ||x||^2 is the same for every centroid and left out: argmin of ||c||^2 - 2 x.c, as one product of [x, 1] with
    [-2 c, ||c||^2]. Where the centroids lie further from the origin than from each other, that difference would
    cancel in fp32: both sides are then taken relative to the centroids' mean.

    With an orthonormal `basis` (D, p) the product x.c is taken between projections while ||c||^2 stays whole: D / p
    times less work, and what it gets wrong are near ties.
    """

    def __init__(self, centroids: np.ndarray, basis: np.ndarray | None = None) -> None:
        norms = np.einsum("kd,kd->k", centroids, centroids)
        mean = centroids.mean(axis=0)
        self.basis = basis
        self.shift = mean if basis is not None or mean @ mean > norms.mean() / 2 else None
        if self.shift is not None:
            centroids = centroids - mean
            norms = np.einsum("kd,kd->k", centroids, centroids)
        if basis is not None:
            centroids, self.shift = centroids @ basis, mean @ basis
        self.table = np.concatenate([-2 * centroids, norms[:, None]], axis=1).T.copy()  # (D + 1 or p + 1, K)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Labels int32 (n,) of rows (n, D), of the centroids' dtype. Ties go to the lowest index."""
        if self.basis is not None:
            x = x @ self.basis
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


def nearest_centroid(x: np.ndarray, centroids: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
    """The nearest of centroids (K, D) to each row of x (n, D): int32 (n,). See NearestCentroid."""
    return NearestCentroid(centroids.astype(x.dtype, copy=False), basis)(x)


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
    """What one pass over the rows asks for: centroids of R restarts, and how exactly each is to be looked at."""

    centroids: np.ndarray  # (R, K, D)
    shares: np.ndarray  # (R,), the share of the rows that counts; smaller samples are part of larger ones
    shortcuts: Sequence[Shortcut | None]  # R: how to assign, or exactly

    @classmethod
    def exact(cls, centroids: np.ndarray) -> Pass:
        return cls(centroids, np.ones(len(centroids)), [None] * len(centroids))


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
        find: dict[int, Callable[[slice, np.ndarray], np.ndarray]] = {}
        for restart in restarts.tolist():
            centroids = wanted.centroids[restart].astype(dtype, copy=False)
            find[restart] = _finder(rows, metric, centroids, wanted.shortcuts[restart], sample)
        for here, x in blocks(rows, metric, sample):
            x64 = x.astype(np.float64)
            w = np.ones(len(x)) if own is None else own[here]
            totals.squares[restarts] += float(w @ np.einsum("nd,nd->n", x64, x64))
            for restart, nearest in find.items():
                labels = nearest(here, x)
                present, at = np.unique(labels, return_inverse=True)  # of many clusters, a block touches few
                members = csr_matrix((w, (at, np.arange(len(x)))), shape=(len(present), len(x)))
                totals.sums[restart, present] += members @ x64
                totals.counts[restart, present] += np.bincount(at, weights=w)
    return totals


def _finder(
    rows: np.ndarray, metric: str, centroids: np.ndarray, shortcut: Shortcut | None, sample: np.ndarray | slice
) -> Callable[[slice, np.ndarray], np.ndarray]:
    """Labels of a block (slice, rows) of the sample."""
    if shortcut is None:
        find = NearestCentroid(centroids)
        return lambda here, x: find(x)
    labels = shortcut.labels(rows, metric, centroids, sample)
    return lambda here, x: labels[here]


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
        """The `count` highest of several; ties go to the earlier one."""
        columns = zip(*(vars(part).values() for part in found), strict=True)
        joined = cls(*(np.concatenate(column) for column in columns))
        order = np.argsort(-joined.keys, kind="stable")[:count]
        return cls(*(column[order] for column in vars(joined).values()))


def farthest(
    rows: np.ndarray,
    metric: str,
    wanted: Pass,
    count: int,
    weights: np.ndarray | None = None,
    seed: int | Sequence[int] = 0,
    draw: int | None = None,
) -> Farthest:
    """The `count` rows of (n, D) that are farthest from their centroid, for the one restart of `wanted`.

    With a `draw` they are drawn at random instead, without replacement, in proportion to w ||x - c||^2: the highest
    of w ||x - c||^2 / Exp(1) (Efraimidis and Spirakis, 2006). Draws of different numbers are independent.
    """
    none = np.empty(0)
    dtype = np.result_type(rows.dtype, np.float32)
    found = Farthest(none, none, np.empty(0, np.int32), np.empty((0, rows.shape[1]), dtype), none)
    sample = nested_sample(len(rows), float(wanted.shares[0]), seed)
    own = None if weights is None else weights[sample]
    generator = None if draw is None else np.random.default_rng([draw, *np.atleast_1d(seed)])
    shortcut = wanted.shortcuts[0]
    find = NearestCentroid(wanted.centroids[0].astype(dtype, copy=False), shortcut.basis if shortcut else None)
    for here, x in blocks(rows, metric, sample):
        labels = find(x)
        w = np.ones(len(x)) if own is None else own[here]
        squared = squared_distances(x, wanted.centroids[0], labels)
        keys = squared if generator is None else w * squared / generator.standard_exponential(len(x))
        found = Farthest.merge([found, Farthest(keys, squared, labels, x, w)], count)
    return found
