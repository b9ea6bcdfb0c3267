"""Lloyd's algorithm over rows that somebody else holds: an array here, the parts of a feature store on workers there.

Restarts run side by side, so that each iteration is one pass over the rows. Under "cosine" the rows have unit length
and a centroid is the normalised mean (spherical k-means, Dhillon and Modha, 2001); all else is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from sklearn.cluster import kmeans_plusplus

from sslscale.cluster.kernels import Farthest, Totals, accumulate, farthest
from sslscale.features import sample_positions
from sslscale.features.distance import prepare
from sslscale.features.files import replacing

SAMPLE_PER_CLUSTER = 256  # rows a cluster that the initial centroids are drawn from, as in faiss
MIN_SAMPLE = 16384


class Rows(Protocol):
    """N rows, seen only through sums, the few farthest, and one bounded sample."""

    num_rows: int

    def totals(self, centroids: np.ndarray) -> Totals:
        """Of all rows, for centroids (R, K, D)."""
        ...

    def farthest(self, centroids: np.ndarray, count: int) -> Farthest:
        """The `count` rows farthest from centroids (K, D)."""
        ...

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """`min(size, N)` prepared rows without replacement, in row order, and their weights."""
        ...


class ArrayRows:
    """Rows in an array (n, D)."""

    def __init__(self, x: np.ndarray, metric: str, weights: np.ndarray | None = None) -> None:
        self.x, self.metric, self.weights = x, metric, weights
        self.num_rows = len(x)

    def totals(self, centroids: np.ndarray) -> Totals:
        return accumulate(self.x, self.metric, centroids, self.weights)

    def farthest(self, centroids: np.ndarray, count: int) -> Farthest:
        return farthest(self.x, self.metric, centroids, count, self.weights)

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        at = sample_positions(self.num_rows, size, seed)
        return prepare(self.x[at], self.metric), np.ones(len(at)) if self.weights is None else self.weights[at]


@dataclass
class LloydState:
    """All that the next iteration depends on."""

    centroids: np.ndarray  # (R, K, D)
    objective: np.ndarray  # (R,) float64, at the last pass; inf before the first
    active: np.ndarray  # (R,) bool
    iterations: np.ndarray  # (R,) int64, updates made so far
    passes: int = 0  # over the rows

    @property
    def best(self) -> int:
        """The restart with the lowest objective, the first of equals."""
        return int(np.argmin(self.objective))

    def save(self, path: Path) -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> LloydState:
        with np.load(path, allow_pickle=False) as file:
            return cls(file["centroids"], file["objective"], file["active"], file["iterations"], int(file["passes"]))


def initial_state(rows: Rows, num_clusters: int, init: str | np.ndarray, num_init: int, seed: int) -> LloydState:
    """Initial centroids: an array (K, D) as given, or rows chosen by "random" or "k-means++" from a bounded sample.

    k-means++ is scikit-learn's greedy variant (Arthur and Vassilvitskii, 2007).
    """
    if isinstance(init, np.ndarray):
        centroids = init[None]
    else:
        sample, weights = rows.sample(max(SAMPLE_PER_CLUSTER * num_clusters, MIN_SAMPLE), seed)
        seeds = [int(restart) for restart in np.random.SeedSequence(seed).generate_state(num_init)]
        centroids = np.stack([_choose(sample, weights, num_clusters, init, restart) for restart in seeds])
    restarts = len(centroids)
    return LloydState(
        centroids, np.full(restarts, np.inf), np.ones(restarts, dtype=bool), np.zeros(restarts, dtype=np.int64)
    )


def _choose(sample: np.ndarray, weights: np.ndarray, num_clusters: int, init: str, seed: int) -> np.ndarray:
    if init == "k-means++":
        return kmeans_plusplus(sample, num_clusters, sample_weight=weights, random_state=seed)[0]
    share = weights / weights.sum()
    return sample[np.random.default_rng(seed).choice(len(sample), num_clusters, replace=False, p=share)]


def lloyd(
    rows: Rows,
    state: LloydState,
    *,
    metric: str,
    max_iterations: int,
    tolerance: float,
    checkpoint: Callable[[LloydState], None] = lambda state: None,
) -> LloydState:
    """Iterates until every restart has converged or has made `max_iterations` updates.

    A restart has converged when its objective falls by at most `tolerance` times itself and no cluster is empty that
    a row could fill. `checkpoint(state)` is called after every pass; going on from a saved state gives the same bits.
    """
    while state.active.any():
        running = np.flatnonzero(state.active)
        centroids = state.centroids[running]
        totals = rows.totals(centroids)
        objective = totals.objective(centroids)
        for at, restart in enumerate(running):
            before, now = state.objective[restart], objective[at]
            fell = now > 0 if np.isinf(before) else before - now > tolerance * before
            state.objective[restart] = now
            state.active[restart] = state.iterations[restart] < max_iterations and (
                _refill_empty(rows, totals, at, centroids[at]) or fell
            )
            if state.active[restart]:
                state.centroids[restart] = _update(totals.sums[at], totals.counts[at], centroids[at], metric)
                state.iterations[restart] += 1
        state.passes += 1
        checkpoint(state)
    return state


def _update(sums: np.ndarray, counts: np.ndarray, before: np.ndarray, metric: str) -> np.ndarray:
    """The means (K, D) of the clusters, normalised under "cosine"; a cluster without any stays where it was."""
    scale = np.linalg.norm(sums, axis=1) if metric == "cosine" else counts
    return np.where(scale[:, None] > 0, sums / np.where(scale > 0, scale, 1)[:, None], before).astype(before.dtype)


def _refill_empty(rows: Rows, totals: Totals, at: int, centroids: np.ndarray) -> bool:
    """Gives each empty cluster the row farthest from its own centroid, taken out of its cluster's sum.

    The rows are chosen as scikit-learn chooses them. Rows at distance 0 stay (fewer distinct rows than clusters), and
    so does the last row of a cluster. True if a cluster was filled.
    """
    sums, counts = totals.sums[at], totals.counts[at]
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return False
    found = rows.farthest(centroids, len(empty))
    filled = 0
    for squared, donor, row, weight in zip(found.squared, found.labels, found.rows, found.weights, strict=True):
        if squared > 0 and 0 < weight < counts[donor]:
            cluster, value = empty[filled], weight * row.astype(np.float64)
            sums[donor] -= value
            counts[donor] -= weight
            sums[cluster], counts[cluster] = value, weight
            filled += 1
    return filled > 0
