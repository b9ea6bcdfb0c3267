"""Two levels of k-means, for numbers of clusters that a flat pass cannot afford.

sqrt(K) parents are fitted over all rows; each parent's own rows are then split into a share of the K clusters that is
proportional to their number; a row is assigned among the children of the parents nearest to its own (see tree.py).

Clusters are many where rows are many. Balanced, they spread over what the rows cover instead, as in Vo et al., 2024,
https://arxiv.org/abs/2405.15613: parents are fitted again, several times, on as many rows of each, and share the K
clusters equally. Centroids fitted to rows of density p lie with density p^a, a = d / (d + 2) in d dimensions; rows
drawn equally from their clusters have that density, and the next centroids p^(a^2): ever more evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sslscale.cluster.lloyd import SAMPLE_PER_CLUSTER, ArrayRows, lloyd, schedule
from sslscale.cluster.seeding import initial_state
from sslscale.cluster.tree import Tree, by_group, nearest_group
from sslscale.features import FeatureSet, sample_positions
from sslscale.features.distance import prepare
from sslscale.runtime.base import compute_threads

RESAMPLINGS = 4  # of the balanced method


def num_parents(num_clusters: int) -> int:
    return max(1, round(num_clusters**0.5))


def child_counts(sizes: np.ndarray, num_clusters: int, balanced: bool = False) -> np.ndarray:
    """How many of K clusters each parent's `sizes` (P,) rows get: int64 (P,), K in sum.

    In proportion (largest remainders), or `balanced` as many for each parent; but one for every parent that has rows,
    and none has more clusters than rows: there are at least as many clusters as parents with rows, and as many rows as
    clusters.
    """
    shares = (sizes > 0) if balanced else sizes
    quota = shares * (num_clusters / shares.sum())
    least = np.minimum(sizes, 1).astype(np.int64)
    counts = np.clip(quota.astype(np.int64), least, sizes)
    while left := num_clusters - int(counts.sum()):
        may = np.flatnonzero(counts < sizes) if left > 0 else np.flatnonzero(counts > least)
        owed = np.sign(left) * (quota - counts)[may]
        counts[may[np.argsort(-owed, kind="stable")[: abs(left)]]] += np.sign(left)
    return counts


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


def tree_of(parents: np.ndarray, counts: np.ndarray) -> Tree:
    """Over the children of parents (P, D), `counts` (P,) of each, that stand one parent after the other."""
    return Tree(parents, np.arange(counts.sum()), np.concatenate([[0], np.cumsum(counts)]))


def fit_array(
    rows: ArrayRows, num_clusters: int, init: str, num_init: int, max_iterations: int, tolerance: float, seed: int
) -> tuple[np.ndarray, Tree, int]:
    """Centroids (K, D) of an array's rows, the tree to assign by, and how often the parents were updated."""
    x, metric = rows.x, rows.metric
    number = num_parents(num_clusters)
    state = lloyd(
        rows,
        initial_state(rows, number, init, num_init, seed),
        metric=metric,
        max_iterations=max_iterations,
        tolerance=tolerance,
        steps=schedule("minibatch", len(x), number),
    )
    parents = state.centroids[state.best]
    order, starts = by_group(nearest_group(x, metric, parents), len(parents))
    counts = child_counts(np.diff(starts), num_clusters)

    def children(parent: int) -> np.ndarray:
        own, wanted = order[starts[parent] : starts[parent + 1]], int(counts[parent])
        sample = prepare(x[own[sample_positions(len(own), sample_limit(wanted), seed)]], metric)
        return split(sample, wanted, metric, init, max_iterations, tolerance, seed)

    with compute_threads(1), ThreadPoolExecutor(rows.threads) as pool:
        centroids = np.concatenate(list(pool.map(children, np.flatnonzero(counts).tolist())))
    return centroids, tree_of(parents, counts), int(state.iterations[state.best])


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


def sample_limit(num_children: int) -> int:
    """Rows that a parent's split looks at."""
    return SAMPLE_PER_CLUSTER * num_children
