"""What a clustering is worth: against labels, and without any.

`assignments` is int (N,), values below K; `labels` is int (N,), any values. Labels measure, they never choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix

CHUNK = 1024  # centroids whose distances to all others are held at once


def clustering_accuracy(labels: np.ndarray, assignments: np.ndarray) -> float:
    """ACC: the share of samples that agree under the best one-to-one match of clusters and classes.

    The Hungarian method (Kuhn, 1955) on the contingency table; with unequal numbers, what stays unmatched is wrong.
    """
    table = contingency_matrix(labels, assignments)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def purity(labels: np.ndarray, assignments: np.ndarray) -> float:
    """The share of samples that belong to the most frequent class of their cluster."""
    return float(contingency_matrix(labels, assignments).max(axis=0).sum() / len(labels))


def imbalance(sizes: np.ndarray) -> float:
    """K sum n_k^2 / N^2, as faiss's imbalance factor: 1 when all clusters are equal, K when one holds everything."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return float(len(sizes) * (sizes**2).sum() / sizes.sum() ** 2)


def davies_bouldin(centroids: np.ndarray, assignments: np.ndarray, distances: np.ndarray) -> float | None:
    """Mean over clusters i of max_j (s_i + s_j) / ||c_i - c_j||, s_i = mean Euclidean distance to the own centroid.

    Davies and Bouldin, 1979. `distances` is (N,), to the own centroid; rows are not needed. Lower is better. Empty
    clusters are left out; None with fewer than two others, or where two centroids coincide.
    """
    sizes = np.bincount(assignments, minlength=len(centroids))
    used = np.flatnonzero(sizes)
    if len(used) < 2:
        return None
    spread = np.bincount(assignments, weights=distances, minlength=len(centroids))[used] / sizes[used]
    c = centroids[used].astype(np.float64)
    norms = (c**2).sum(axis=1)
    worst = np.empty(len(used))
    for start in range(0, len(used), CHUNK):
        here = slice(start, min(start + CHUNK, len(used)))
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


def label_measures(labels: np.ndarray | None, assignments: np.ndarray) -> dict[str, Any]:
    """`acc, nmi, ari, purity`; each None without labels. NMI is normalised by the arithmetic mean of the entropies."""
    if labels is None:
        return dict.fromkeys(("acc", "nmi", "ari", "purity"))
    return {
        "acc": clustering_accuracy(labels, assignments),
        "nmi": float(normalized_mutual_info_score(labels, assignments)),
        "ari": float(adjusted_rand_score(labels, assignments)),
        "purity": purity(labels, assignments),
    }
