"""Clusterers that look at all rows at once, through scikit-learn, where there are few enough."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, SpectralClustering
from sklearn.mixture import GaussianMixture

from sslscale.errors import StageError, UserError

# Rows that a method still handles in minutes and within a few GB.
MAX_ROWS = {"hdbscan": 50_000, "gmm": 500_000, "spectral": 20_000, "ward": 20_000}
SPECTRAL_NEIGHBOURS = 10
NOISE = -1


def check_rows(method: str, num_rows: int) -> None:
    """Raises UserError where `method` cannot handle so many rows."""
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
        labels = SpectralClustering(
            num_clusters,
            affinity="nearest_neighbors",
            n_neighbors=min(SPECTRAL_NEIGHBOURS, len(x)),
            n_init=num_init,
            random_state=seed,
        ).fit_predict(x)
    else:
        assert method == "ward", method
        labels = AgglomerativeClustering(num_clusters, linkage="ward").fit_predict(x)
    return labels.astype(np.int32)


def means(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean (K, D) fp32 of the rows of each label; NOISE is left out."""
    sums = np.zeros((labels.max() + 1, x.shape[1]))
    known = labels != NOISE
    np.add.at(sums, labels[known], x[known])
    counts = np.bincount(labels[known])
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
