"""Two dimensions for the eye."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from sklearn.decomposition import PCA

from sslscale.errors import missing_package


def check_method(method: str | None) -> None:
    """UserError where umap-learn is needed and not installed."""
    if method == "umap" and find_spec("umap") is None:
        raise missing_package("umap-learn", extra="maps")


def two_dimensions(x: np.ndarray, method: str, metric: str, seed: int) -> np.ndarray:
    """Rows (n, D) as points (n, 2) fp32, by "pca" or "umap" (McInnes et al., 2018, https://arxiv.org/abs/1802.03426).

    Raises UserError where umap-learn is not installed.
    """
    check_method(method)
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(x).astype(np.float32)
    import umap

    metric = {"l2": "euclidean", "cosine": "cosine"}[metric]
    return umap.UMAP(metric=metric, random_state=seed, n_jobs=1).fit_transform(x).astype(np.float32)
