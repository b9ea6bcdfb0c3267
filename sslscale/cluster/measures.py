"""What a clustering is worth: against labels, and without any. Labels measure, they never choose.

Everything but the silhouette comes from a tally, which is added up part by part: what it holds depends on the number
of clusters and on how many pairs of class and cluster occur, not on the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from sklearn.metrics import mutual_info_score, silhouette_score

CHUNK_BYTES = 2**28  # of distances between centroids that are held at once
MOST_PAIRED = 2**16  # clusters, of which all pairs are still compared
MOST_MATCHED = 2**26  # clusters times classes that are still matched: minutes, and a GB for the table and its copy
PENDING = 2**20  # counts that wait to be added up, at least


@dataclass
class Tally:
    """Of K = `num_clusters`: `sizes` int64 (K,), `distances` summed float64 (K,), and `counts` of its classes."""

    num_clusters: int
    labelled: bool = True
    sizes: np.ndarray = field(init=False)
    distances: np.ndarray = field(init=False)
    _counts: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes, self.distances = np.zeros(self.num_clusters, np.int64), np.zeros(self.num_clusters)

    def add(self, assignments: np.ndarray, distances: np.ndarray, labels: np.ndarray | None) -> None:
        """Rows with their clusters (n,), values below K, distances to the own centroid (n,) and classes (n,), if any.

        Without labels for all rows there is no measure against labels.
        """
        self.sizes += np.bincount(assignments, minlength=self.num_clusters)
        self.distances += np.bincount(assignments, weights=distances, minlength=self.num_clusters)
        self.labelled &= labels is not None
        if labels is None:
            return
        names, places = np.unique(labels, return_inverse=True)
        pairs, counts = np.unique(places * self.num_clusters + assignments, return_counts=True)
        self._counts.append(
            np.stack([names.astype(np.int64)[pairs // self.num_clusters], pairs % self.num_clusters, counts])
        )
        held, *pending = (own.shape[1] for own in self._counts)
        if sum(pending) > max(held, PENDING):
            self._counts = [_added(self._counts)]

    @property
    def counts(self) -> np.ndarray:
        """Classes, clusters, and how many rows both have: int64 (3, m) of the m pairs that occur, in their order."""
        self._counts = [_added(self._counts)]
        return self._counts[0]

    def merged(self, other: Tally) -> Tally:
        """Of the rows of both."""
        both = Tally(self.num_clusters, self.labelled and other.labelled)
        both.sizes, both.distances = self.sizes + other.sizes, self.distances + other.distances
        both._counts = [*self._counts, *other._counts]
        return both

    def label_measures(self) -> dict[str, Any]:
        """`acc, nmi, ari, purity`, each None without labels; `acc` also above MOST_MATCHED clusters times classes.

        ACC: the share of samples that agree under the best one-to-one match of clusters and classes (the Hungarian
        method, Kuhn, 1955); with unequal numbers, what stays unmatched is wrong. NMI is normalised by the arithmetic
        mean of the entropies. ARI: Hubert and Arabie, 1985. Purity: the share of samples that belong to the most
        frequent class of their cluster.
        """
        classes, clusters, counts = self.counts
        if not self.labelled or not len(counts):
            return dict.fromkeys(("acc", "nmi", "ari", "purity"))
        at = tuple(np.unique(of, return_inverse=True)[1] for of in (classes, clusters))
        table = csr_array((counts, at))  # (classes, clusters), without empty ones
        return {
            "acc": _accuracy(table),
            "nmi": _nmi(table),
            "ari": _ari(table),
            "purity": float(table.max(axis=0).sum() / counts.sum()),
        }


def label_measures(labels: np.ndarray | None, assignments: np.ndarray) -> dict[str, Any]:
    """`Tally.label_measures` of rows with classes (N,) and clusters int (N,)."""
    tally = Tally(int(assignments.max()) + 1)
    tally.add(assignments, np.zeros(len(assignments)), labels)
    return tally.label_measures()


def _added(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Several `Tally.counts`, in any order, as one."""
    joined = np.concatenate([np.zeros((3, 0), np.int64), *counts], axis=1)
    joined = joined[:, np.lexsort(joined[1::-1])]
    other = (joined[:2, 1:] != joined[:2, :-1]).any(axis=0)
    first = np.flatnonzero(np.concatenate([[True], other])[: joined.shape[1]])
    return np.concatenate([joined[:2, first], np.add.reduceat(joined[2:], first, axis=1)]) if len(first) else joined


def _accuracy(table: csr_array) -> float | None:
    if table.shape[0] * table.shape[1] > MOST_MATCHED:
        return None
    costs = -table.toarray().astype(np.float64)
    return float(-costs[linear_sum_assignment(costs)].sum() / table.sum())


def _nmi(table: csr_array) -> float:
    entropies = []
    for counts in (table.sum(axis=0), table.sum(axis=1)):
        share = counts / counts.sum()
        entropies.append(-(share * np.log(share)).sum())
    if max(entropies) == 0:  # one cluster, one class
        return 1.0
    return float(max(0.0, mutual_info_score(None, None, contingency=table)) / np.mean(entropies))


def _ari(table: csr_array) -> float:
    """By pairs of rows; in Python's integers, which hold their squares."""
    total, same = int(table.sum()), int((table.data**2).sum())
    of_cluster, of_class = (int((table.sum(axis=axis) ** 2).sum()) for axis in (0, 1))
    together, apart = same - total, total**2 - of_cluster - of_class + same
    only_cluster, only_class = of_cluster - same, of_class - same
    if not only_cluster and not only_class:
        return 1.0
    agreed = (together + only_class) * (only_class + apart) + (together + only_cluster) * (only_cluster + apart)
    return 2 * (together * apart - only_class * only_cluster) / agreed


def imbalance(sizes: np.ndarray) -> float:
    """K sum n_k^2 / N^2, as faiss's imbalance factor: 1 when all clusters are equal, K when one holds everything."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return float(len(sizes) * (sizes**2).sum() / sizes.sum() ** 2)


def davies_bouldin(centroids: np.ndarray, tally: Tally) -> float | None:
    """Mean over clusters i of max_j (s_i + s_j) / ||c_i - c_j||, s_i = mean Euclidean distance to the own centroid.

    Davies and Bouldin, 1979. Rows are not needed. Lower is better. Empty clusters are left out; None with fewer than
    two others, where two centroids coincide, and above MOST_PAIRED clusters, whose pairs would take hours.
    """
    used = np.flatnonzero(tally.sizes)
    if not 2 <= len(used) <= MOST_PAIRED:
        return None
    spread = tally.distances[used] / tally.sizes[used]
    c = centroids[used].astype(np.float64)
    norms = (c**2).sum(axis=1)
    worst = np.empty(len(used))
    chunk = max(1, CHUNK_BYTES // c.itemsize // len(used))
    for start in range(0, len(used), chunk):
        here = slice(start, min(start + chunk, len(used)))
        squared = norms[here, None] + norms - 2 * c[here] @ c.T
        own = np.arange(here.start, here.stop)
        squared[own - start, own] = np.inf
        if (squared <= 0).any():
            return None
        worst[here] = ((spread[here, None] + spread) / np.sqrt(squared)).max(axis=1)
    return float(worst.mean())


def silhouette(rows: np.ndarray, assignments: np.ndarray, metric: str) -> float | None:
    """Mean silhouette (Rousseeuw, 1987) of rows (n, D), a sample; None unless they fall into 2 .. n - 1 clusters."""
    if not 2 <= len(np.unique(assignments)) < len(rows):
        return None
    metric = {"l2": "euclidean", "cosine": "cosine"}[metric]
    return float(silhouette_score(rows.astype(np.float32), assignments, metric=metric))
