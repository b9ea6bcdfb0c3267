"""Two levels of k-means, for numbers of clusters that a flat pass cannot afford.

sqrt(K) parents are fitted over all rows; each parent's own rows are then split into a share of the K clusters that is
proportional to their number; a row is assigned among the children of the parents nearest to its own. Distances a row:
sqrt(K) + NEAR_PARENTS sqrt(K) instead of K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sslscale.cluster.kernels import NearestCentroid, blocks
from sslscale.cluster.lloyd import SAMPLE_PER_CLUSTER, ArrayRows, lloyd
from sslscale.cluster.seeding import initial_state
from sslscale.features import FeatureSet, sample_positions
from sslscale.features.distance import prepare

NEAR_PARENTS = 8  # whose children a row is compared with


def num_parents(num_clusters: int) -> int:
    return max(1, round(num_clusters**0.5))


def child_counts(sizes: np.ndarray, num_clusters: int) -> np.ndarray:
    """How many of K clusters each parent's `sizes` (P,) rows get: int64 (P,), K in sum.

    In proportion (largest remainders), but one for every parent that has rows, and none has more clusters than rows:
    there are at least as many clusters as parents with rows, and as many rows as clusters.
    """
    quota = sizes * (num_clusters / sizes.sum())
    least = np.minimum(sizes, 1).astype(np.int64)
    counts = np.clip(quota.astype(np.int64), least, sizes)
    while left := num_clusters - int(counts.sum()):
        may = np.flatnonzero(counts < sizes) if left > 0 else np.flatnonzero(counts > least)
        owed = np.sign(left) * (quota - counts)[may]
        counts[may[np.argsort(-owed, kind="stable")[: abs(left)]]] += np.sign(left)
    return counts


def by_parent(labels: np.ndarray, parents: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (n,) sorted by parent, and where each parent's begin, (P + 1,)."""
    order = np.argsort(labels, kind="stable")
    return order, np.searchsorted(labels[order], np.arange(parents + 1))


def parent_labels(rows: np.ndarray, metric: str, parents: np.ndarray) -> np.ndarray:
    """The nearest of parents (P, D) to each row of (n, D): int32 (n,)."""
    find = NearestCentroid(parents.astype(np.result_type(rows.dtype, np.float32), copy=False))
    return np.concatenate([np.empty(0, np.int32), *(find(x) for _, x in blocks(rows, metric))])


def split(
    x: np.ndarray, num_children: int, metric: str, init: str, max_iterations: int, tolerance: float, seed: int
) -> np.ndarray:
    """Centroids (num_children, D) of one parent's rows x (n, D), prepared."""
    rows = ArrayRows(x, metric)
    state = lloyd(
        rows,
        initial_state(rows, num_children, init, 1, seed),
        metric=metric,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    return state.centroids[0]


def gather(
    features: FeatureSet, spans: Sequence[tuple[int, np.ndarray]], metric: str, limit: int, seed: int
) -> np.ndarray:
    """At most `limit` of the rows `(part, row numbers)`, prepared, (n, D)."""
    total = sum(len(rows) for _, rows in spans)
    chosen = sample_positions(total, limit, seed)
    taken, start = [], 0
    for part, rows in spans:
        own = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
        taken.append(prepare(features.block(part)[rows[own]], metric))
        start += len(rows)
    return np.concatenate(taken)


@dataclass
class Tree:
    """Parents (P, D), the centroids (K, D) of their children, parent after parent, and where each one's begin."""

    parents: np.ndarray
    centroids: np.ndarray
    starts: np.ndarray  # (P + 1,)

    def __post_init__(self) -> None:
        p = self.parents.astype(np.float64)
        norms = (p**2).sum(axis=1)
        squared = norms[:, None] + norms - 2 * p @ p.T
        self._near = np.argsort(squared, axis=1, kind="stable")[:, :NEAR_PARENTS]

    def candidates(self, parent: int) -> np.ndarray:
        """The clusters that rows of this parent are compared with, ascending."""
        near = np.sort(self._near[parent])
        return np.concatenate([np.arange(self.starts[p], self.starts[p + 1]) for p in near])

    def assign(self, rows: np.ndarray, metric: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`(row numbers, prepared rows, labels)` of rows (n, D), parent by parent, in blocks."""
        order, starts = by_parent(parent_labels(rows, metric, self.parents), len(self.parents))
        dtype = np.result_type(rows.dtype, np.float32)
        for parent in np.flatnonzero(np.diff(starts)).tolist():
            clusters = self.candidates(parent)
            find = NearestCentroid(self.centroids[clusters].astype(dtype, copy=False))
            own = order[starts[parent] : starts[parent + 1]]
            for here, x in blocks(rows, metric, own):
                yield own[here], x, clusters[find(x)].astype(np.int32)


def sample_limit(num_children: int) -> int:
    """Rows that a parent's split looks at."""
    return SAMPLE_PER_CLUSTER * num_children
