"""Clusterers that look at all rows at once, through scikit-learn, where there are few enough."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, k_means
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import kneighbors_graph

from sslscale.errors import StageError, UserError

# Rows that a method still handles in minutes and within a few GB.
MAX_ROWS = {"hdbscan": 50_000, "gmm": 500_000, "spectral": 200_000, "ward": 20_000}
SPECTRAL_NEIGHBOURS = 9  # beside the row itself, as scikit-learn counts ten
EIGEN_TOLERANCE = 1e-6
NOISE = -1


def check_rows(method: str, num_rows: int) -> None:
    """Raises UserError where `method` cannot handle so many rows, or so few."""
    if num_rows < 2:
        raise UserError(
            f"cluster.method={method} compares samples, and there is one",
            got=f"n_samples = {num_rows}",
            allowed="2 or more",
            fix="set cluster.method=minibatch",
        )
    if num_rows > MAX_ROWS[method]:
        raise UserError(
            f"too many samples for cluster.method={method}",
            got=num_rows,
            allowed=f"at most {MAX_ROWS[method]}",
            fix="set cluster.method=minibatch, or name fewer datasets",
        )


def fit_labels(x: np.ndarray, method: str, num_clusters: int, num_init: int, seed: int) -> np.ndarray:
    """Labels int32 (n,) of rows x (n, D), prepared. "hdbscan" finds its own number of clusters, and marks NOISE.

    Raises StageError where hdbscan finds none.
    """
    if method == "hdbscan":
        labels = HDBSCAN(min_cluster_size=max(5, len(x) // (20 * num_clusters)), copy=True).fit_predict(x)
        if (labels == NOISE).all():
            raise StageError("hdbscan finds no cluster", got=f"{len(x)} samples", fix="set another cluster.method")
    elif method == "gmm":
        # diagonal: a full covariance of D dimensions needs far more than D rows a cluster; around their mean, because
        # a variance is E x^2 - (E x)^2 to scikit-learn, of which an offset leaves nothing in fp32
        centred = x - x.mean(axis=0, dtype=np.float64)
        mixture = GaussianMixture(num_clusters, covariance_type="diag", n_init=num_init, random_state=seed)
        labels = mixture.fit_predict(centred)
    elif method == "spectral":
        rows = spectral_embedding(x, num_clusters, seed)
        labels = k_means(rows, num_clusters, n_init=num_init, random_state=seed)[1]
    else:
        assert method == "ward", method
        labels = AgglomerativeClustering(num_clusters, linkage="ward").fit_predict(x)
    return labels.astype(np.int32)


def spectral_embedding(x: np.ndarray, dim: int, seed: int) -> np.ndarray:
    """(n, dim): the first eigenvectors of the random walk on the symmetric kNN graph of the rows of x (n, D).

    Shi & Malik 2000 (https://doi.org/10.1109/34.868688); the same rows as scikit-learn's SpectralClustering, which
    finds them by a sparse factorisation of the graph, whose size grows much faster than the graph's; here they come
    from products with the graph alone. Where the graph has more parts than `dim`, the largest count.
    """
    graph = csr_array(kneighbors_graph(x, min(SPECTRAL_NEIGHBOURS, len(x) - 1)))
    graph = (graph + graph.T) / 2
    root = np.sqrt(graph.sum(axis=1))
    walk = diags_array(1 / root) @ graph @ diags_array(1 / root)
    # Eigenvalue 1 has a vector for each part of the graph. Lanczos finds one of them; but they are known.
    parts = connected_components(graph)[1]
    largest = np.argsort(-np.bincount(parts, weights=root**2), kind="stable")[:dim]
    known = root[:, None] * (parts[:, None] == largest)
    known /= np.linalg.norm(known, axis=0)
    if len(largest) == dim:
        return known / root[:, None]
    others = LinearOperator(walk.shape, lambda v: walk @ v - known @ (known.T @ v), dtype=np.float64)
    start = np.random.default_rng(seed).uniform(-1, 1, len(x))
    _, found = eigsh(others, k=dim - len(largest), which="LA", v0=start, tol=EIGEN_TOLERANCE)
    return np.hstack([known, found]) / root[:, None]


def means(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean (K, D) fp32 of the rows of each label; NOISE is left out."""
    sums = np.zeros((labels.max() + 1, x.shape[1]))
    known = labels != NOISE
    np.add.at(sums, labels[known], x[known])
    counts = np.bincount(labels[known])
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
