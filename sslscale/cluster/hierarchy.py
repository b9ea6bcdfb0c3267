"""Two levels of k-means, for numbers of clusters that a flat pass cannot afford.

sqrt(K) parents are fitted over all rows; each parent's own rows are then split into a share of the K clusters that is
proportional to their number; a row is assigned among the children of the parents nearest to its own (see tree.py).
Where children of two parents meet they know nothing of each other: so a few iterations over all rows, assigned in that
way, move all of them together.

Clusters are many where rows are many. Balanced, they spread over what the rows cover instead, as in Vo et al., 2024,
https://arxiv.org/abs/2405.15613: parents are fitted again, several times, on as many rows of each, and share the K
clusters equally. Centroids fitted to rows of density p lie with density p^a, a = d / (d + 2) in d dimensions; rows
drawn equally from their clusters have that density, and the next centroids p^(a^2): ever more evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sslscale.cluster.kernels import Pass
from sslscale.cluster.lloyd import RELAXATION, SAMPLE_PER_CLUSTER, ArrayRows, Rows, lloyd, schedule, update
from sslscale.cluster.seeding import initial_state
from sslscale.cluster.tree import Tree, by_group, nearest_group, share_of
from sslscale.features import FeatureSet, sample_positions
from sslscale.features.distance import prepare
from sslscale.runtime.base import compute_threads

RESAMPLINGS = 4  # of the balanced method
JOINT_ITERATIONS = 3  # of all children, the balanced ones aside: they would go back to where rows are many
JOINT_NEAR = 16  # parents' worth of children that a row is compared with while all of them move
NEAR_PARENTS = 32  # and in the assignment: means suffer less than assignments do from a child that is about as near


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


def tree_of(centroids: np.ndarray, counts: np.ndarray, near: int) -> Tree:
    """Over the children (K, D) of parents, `counts` of each that has any, that stand one parent after the other."""
    counts = counts[counts > 0]
    starts = np.concatenate([[0], np.cumsum(counts)])
    centres = (np.add.reduceat(centroids.astype(np.float64), starts[:-1]) / counts[:, None]).astype(centroids.dtype)
    return Tree.of(centres, centroids, np.split(np.arange(len(centroids)), starts[1:-1]), near)


def compared(sizes: np.ndarray, counts: np.ndarray, near: int) -> float:
    """Centres and children that a row is compared with, in the mean over the parents' rows `sizes` (P,)."""
    sizes, counts = sizes[counts > 0], counts[counts > 0]
    children = np.maximum(counts, share_of(near, len(counts), int(counts.sum())))
    return len(counts) + float(sizes @ children / sizes.sum())


def moved_together(rows: Rows, centroids: np.ndarray, counts: np.ndarray, metric: str, relaxation: float) -> np.ndarray:
    """The children (K, D) after an update over all rows, see `lloyd.update`."""
    tree = tree_of(centroids, counts, JOINT_NEAR)
    totals = rows.totals(Pass(centroids[None], np.ones(1), [tree]))
    moved = update(totals.sums[0], totals.counts[0], centroids, metric, relaxation)
    return _filled(moved, totals.counts[0], counts, metric)


def _filled(centroids: np.ndarray, sizes: np.ndarray, counts: np.ndarray, metric: str) -> np.ndarray:
    """Centroids (K, D) of which each that has no rows shares those of the largest child of its parent, as in faiss."""
    sizes, stops = sizes.copy(), np.cumsum(counts)
    for empty in np.flatnonzero(sizes == 0).tolist():
        parent = int(np.searchsorted(stops, empty, side="right"))
        largest = int(stops[parent] - counts[parent] + sizes[stops[parent] - counts[parent] : stops[parent]].argmax())
        if sizes[largest] < 2:
            continue
        offset = np.where(np.arange(centroids.shape[1]) % 2, 1, -1) * np.abs(centroids[largest]) / 1024
        centroids[empty] = centroids[largest] + offset
        centroids[largest] -= offset
        sizes[empty] = sizes[largest] = sizes[largest] / 2
    return prepare(centroids, metric)


def relaxations(balanced: bool) -> list[float]:
    """Of the iterations of all children; the last one ends at the means."""
    return [] if balanced else [RELAXATION] * (JOINT_ITERATIONS - 1) + [1.0]


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
    for relaxation in relaxations(balanced=False):
        centroids = moved_together(rows, centroids, counts, metric, relaxation)
    return centroids, tree_of(centroids, counts, NEAR_PARENTS), int(state.iterations[state.best])


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
