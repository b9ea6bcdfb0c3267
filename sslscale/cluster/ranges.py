"""The totals of very many clusters, by ranges of centroids instead of by part.

What a part's rows add up to is as large as the centroids, however few its rows are: a million centroids would send more
to the driver than the rows hold. There a pass is made of two rounds. The first writes, a part and restart at a time,
which rows go to which centroid, sorted by centroid; the second adds up the rows of all parts that go to one range of
centroids, in the order of the parts. Every row is read twice, and every sum is sent once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sslscale.cluster.kernels import Pass, Totals, add_rows, blocks, squared_norm
from sslscale.cluster.tree import nearly_nearest

RANGE_BYTES = 2**26  # of the float64 sums that are held and sent at once


@dataclass(frozen=True)
class Range:
    """Centroids [start, stop) of a restart."""

    restart: int
    start: int
    stop: int


def ranges(centroids: np.ndarray) -> list[Range]:
    """All of centroids (R, K, D), RANGE_BYTES of sums each."""
    restarts, clusters, dim = centroids.shape
    width = max(1, RANGE_BYTES // (8 * dim))
    return [
        Range(restart, start, min(start + width, clusters))
        for restart in range(restarts)
        for start in range(0, clusters, width)
    ]


def by_range(centroids: np.ndarray) -> bool:
    """Whether the sums of one restart's centroids, of (R, K, D), are too large to be sent for every part.

    Not those of all: what is rounded in a restart never depends on which others still run.
    """
    return 8 * centroids[0].size > RANGE_BYTES


def find_labels(
    rows: np.ndarray, metric: str, wanted: Pass, restart: int, sample: np.ndarray | slice
) -> tuple[np.ndarray, float]:
    """Labels int32 (n,) of the rows at `sample`, and the sum of their ||x||^2."""
    count = len(rows) if isinstance(sample, slice) else len(sample)
    labels, square = np.empty(count, dtype=np.int32), 0.0
    for at, x, own in nearly_nearest(rows, metric, wanted.centroids[restart], wanted.trees[restart], sample):
        labels[at] = own
        square += squared_norm(x.astype(np.float64), np.ones(len(x)))
    return labels, square


def sorted_rows(labels: np.ndarray, sample: np.ndarray | slice) -> np.ndarray:
    """int32 (2, n): labels, ascending, and the row number in the part of each."""
    order = np.argsort(labels, kind="stable")
    return np.stack([labels[order], order if isinstance(sample, slice) else sample[order]]).astype(np.int32)


def add_range(parts: Iterable[tuple[np.ndarray, np.ndarray]], metric: str, wanted: Range) -> Totals:
    """Totals without squares, (1, stop - start, D), over `(rows (n, D), sorted rows (2, n))` of all parts, in order."""
    totals: Totals | None = None
    for rows, (labels, numbers) in parts:
        if totals is None:
            totals = Totals.zero(np.empty((1, wanted.stop - wanted.start, rows.shape[1])))
        first, end = np.searchsorted(labels, [wanted.start, wanted.stop])
        in_place = np.argsort(numbers[first:end])  # as they lie in the file
        own, at = labels[first:end][in_place] - wanted.start, numbers[first:end][in_place]
        for here, x in blocks(rows, metric, at):
            add_rows(own[here], x.astype(np.float64), np.ones(len(x)), totals.sums[0], totals.counts[0])
    assert totals is not None, "a feature set has parts"
    return totals
