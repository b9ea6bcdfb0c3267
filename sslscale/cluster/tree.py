"""Nearest centroids by way of groups of them: rows are compared with the centroids near their group's centre only.

K centroids lie in sqrt(K) groups; a row goes to the nearest centre of a group, and is compared with the centroids
nearest to that centre, as many as NEAR_GROUPS groups have, or as a tree says, and with all of the group's own. As an
inverted file does, this finds a centroid that is the nearest or about as near, by about (1 + NEAR_GROUPS) sqrt(K)
distances instead of K. Centroids chosen one by one lie in a ball around the rows of the group; whole groups, which an
inverted file reads, reach away from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sslscale.cluster.kernels import NearestCentroid, Pass, accumulate, blocks

NEAR_GROUPS = 8
MIN_CENTROIDS = 512  # below, all are compared in about the same time
MAX_SHARE = 0.5  # of the centroids that a row is compared with
MIN_FOUND = 0.75  # of the centroids that are as near to their group's centre as others that its rows are compared with
BLOCK_BYTES = 2**26  # of the distances between centres and centroids that are held at once
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


def share_of(near: int, groups: int, num_centroids: int) -> int:
    """How many of K centroids `near` of as many groups have."""
    return min(num_centroids, math.ceil(near * num_centroids / groups))


@dataclass
class Tree:
    """Centres (P, D) of groups, and the centroids that rows of each are compared with: P arrays, ascending."""

    centres: np.ndarray
    candidates: Sequence[np.ndarray]

    @classmethod
    def of(cls, centres: np.ndarray, centroids: np.ndarray, groups: Sequence[np.ndarray], near: int) -> Tree:
        """Over centroids (K, D) in `groups`, P arrays of their numbers: a group's own, and those nearest to its centre,
        as many in all as `near` groups have.
        """
        return cls(centres, _near(centres, centroids, groups, near)[0])

    @classmethod
    def over(cls, centroids: np.ndarray) -> Tree | None:
        """Of centroids (K, D), by a few iterations of k-means; none where they are few, or have no groups.

        They have none where, as in isotropic data of many dimensions, most lie nearest to one centre, or centres are
        hardly nearer to their own centroids than to others.
        """
        if len(centroids) < MIN_CENTROIDS:
            return None
        chosen = np.random.default_rng(0).choice(len(centroids), round(len(centroids) ** 0.5), replace=False)
        centres = centroids[np.sort(chosen)]
        for _ in range(GROUPING_ITERATIONS):
            totals = accumulate(centroids, "l2", Pass.of(centres[None]))
            counts = totals.counts[0][:, None]
            centres = np.where(counts > 0, totals.sums[0] / np.maximum(counts, 1), centres).astype(centroids.dtype)
        order, starts = by_group(nearest_group(centroids, "l2", centres), len(centres))
        candidates, found = _near(centres, centroids, np.split(order, starts[1:-1]), NEAR_GROUPS)
        sizes = np.diff(starts)
        compared = sizes @ [len(own) for own in candidates] / len(centroids)  # if rows lie as centroids do
        return cls(centres, candidates) if compared < MAX_SHARE * len(centroids) and found >= MIN_FOUND else None

    def assign(
        self, rows: np.ndarray, metric: str, centroids: np.ndarray, sample: np.ndarray | slice = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`(positions, prepared rows, labels)` of rows (n, D) at `sample`, group by group, in blocks.

        Positions count from the start of what is read, labels are of centroids (K, D).
        """
        dtype = np.result_type(rows.dtype, np.float32)
        order, starts = by_group(nearest_group(rows, metric, self.centres, sample), len(self.centres))
        for group in np.flatnonzero(np.diff(starts)).tolist():
            candidates = self.candidates[group]
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


def _near(
    centres: np.ndarray, centroids: np.ndarray, groups: Sequence[np.ndarray], near: int
) -> tuple[list[np.ndarray], float]:
    """The candidates of `Tree.of`, and the share of the centroids that are among them by their distance alone."""
    wide, count = centroids.astype(np.float64), share_of(near, len(centres), len(centroids))
    norms = np.einsum("kd,kd->k", wide, wide)
    candidates, found, rows = [], 0, max(1, BLOCK_BYTES // norms.nbytes)
    for start in range(0, len(centres), rows):
        block = norms - 2 * centres[start : start + rows].astype(np.float64) @ wide.T
        for squared, own in zip(block, groups[start : start + rows], strict=True):
            found += int((squared[own] <= np.partition(squared, count - 1)[count - 1]).sum())
            squared[own] = -np.inf
            last = max(count, len(own)) - 1
            candidates.append(np.sort(np.argpartition(squared, last)[: last + 1]).astype(np.int32))
    return candidates, found / len(wide)
