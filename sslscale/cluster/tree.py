"""Nearest centroids by way of groups of them: rows are compared with the centroids of the nearest groups only.

K centroids lie in sqrt(K) groups; a row goes to the nearest group, and is compared with the centroids of that group and
of the groups nearest to it, NEAR_GROUPS in all or as many as a tree says. That is what an inverted file does, and finds
a centroid that is the nearest or about as near, by (1 + NEAR_GROUPS) sqrt(K) distances instead of K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sslscale.cluster.kernels import NearestCentroid, Pass, accumulate, blocks

NEAR_GROUPS = 8
MIN_CENTROIDS = 512  # below, all are compared in about the same time
MAX_SHARE = 0.5  # of the centroids that a row is compared with
GROUPING_ITERATIONS = 5  # of centroids into groups, from a random choice


def by_group(labels: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n,) sorted by label, and where each group's begin, (P + 1,)."""
    order = np.argsort(labels, kind="stable")
    return order, np.searchsorted(labels[order], np.arange(groups + 1))


def nearest_group(
    rows: np.ndarray, metric: str, centres: np.ndarray, sample: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """The nearest of centres (P, D) to each row of (n, D) at `sample`: int32."""
    find = NearestCentroid(centres.astype(np.result_type(rows.dtype, np.float32), copy=False))
    return np.concatenate([np.empty(0, np.int32), *(find(x) for _, x in blocks(rows, metric, sample))])


@dataclass
class Tree:
    """Centres (P, D) of groups, and which of K centroids are in each: those at `order[starts[p] : starts[p + 1]]`."""

    centres: np.ndarray
    order: np.ndarray  # (K,)
    starts: np.ndarray  # (P + 1,)
    near: int = NEAR_GROUPS  # groups that a row is compared with

    def __post_init__(self) -> None:
        c = self.centres.astype(np.float64)
        norms = (c**2).sum(axis=1)
        squared = norms[:, None] + norms - 2 * c @ c.T
        self._near = np.argsort(squared, axis=1, kind="stable")[:, : self.near]

    @classmethod
    def over(cls, centroids: np.ndarray) -> Tree | None:
        """Of centroids (K, D), by a few iterations of k-means; none where they are few, or have no groups.

        They have none where, as in isotropic data, most lie nearest to one: little would be left out.
        """
        if len(centroids) < MIN_CENTROIDS:
            return None
        chosen = np.random.default_rng(0).choice(len(centroids), round(len(centroids) ** 0.5), replace=False)
        centres = centroids[np.sort(chosen)]
        for _ in range(GROUPING_ITERATIONS):
            totals = accumulate(centroids, "l2", Pass.of(centres[None]))
            counts = totals.counts[0][:, None]
            centres = np.where(counts > 0, totals.sums[0] / np.maximum(counts, 1), centres).astype(centroids.dtype)
        tree = cls(centres, *by_group(nearest_group(centroids, "l2", centres), len(centres)))
        sizes = np.diff(tree.starts)
        compared = sizes @ sizes[tree._near].sum(axis=1) / len(centroids)  # with a row, if rows lie as centroids do
        return tree if compared < MAX_SHARE * len(centroids) else None

    def candidates(self, group: int) -> np.ndarray:
        """The centroids that rows of this group are compared with, ascending."""
        near = self._near[group]
        return np.sort(np.concatenate([self.order[self.starts[p] : self.starts[p + 1]] for p in near]))

    def assign(
        self, rows: np.ndarray, metric: str, centroids: np.ndarray, sample: np.ndarray | slice = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`(positions, prepared rows, labels)` of rows (n, D) at `sample`, group by group, in blocks.

        Positions count from the start of what is read, labels are of centroids (K, D).
        """
        dtype = np.result_type(rows.dtype, np.float32)
        order, starts = by_group(nearest_group(rows, metric, self.centres, sample), len(self.centres))
        for group in np.flatnonzero(np.diff(starts)).tolist():
            candidates = self.candidates(group)
            find = NearestCentroid(centroids[candidates].astype(dtype, copy=False))
            own = order[starts[group] : starts[group + 1]]
            for here, x in blocks(rows, metric, own if isinstance(sample, slice) else sample[own]):
                yield own[here], x, candidates[find(x)].astype(np.int32)


def nearly_nearest(
    rows: np.ndarray,
    metric: str,
    centroids: np.ndarray,
    tree: Tree | None,
    sample: np.ndarray | slice = slice(None),
) -> Iterator[tuple[np.ndarray | slice, np.ndarray, np.ndarray]]:
    """`Tree.assign`; exactly, and in the order of the rows, where there is no tree."""
    if tree is not None:
        yield from tree.assign(rows, metric, centroids, sample)
        return
    find = NearestCentroid(centroids.astype(np.result_type(rows.dtype, np.float32), copy=False))
    for here, x in blocks(rows, metric, sample):
        yield here, x, find(x)
