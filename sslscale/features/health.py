"""Is a representation healthy? Measures that need no label: they catch collapse, they do not choose K.

Rows are samples: x is (n, d), any float dtype; everything is computed in float64.
"""

from __future__ import annotations

import numpy as np

EPSILON = 1e-7


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def _effective_rank(weights: np.ndarray) -> float:
    """exp(entropy) of non-negative weights normalised to sum 1 (Roy and Vetterli, 2007): how many of them matter."""
    total = weights.sum()
    if total == 0:
        return 0.0
    p = weights / total + EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


def rankme(x: np.ndarray) -> float:
    """RankMe: exp(-sum p log p), p = singular values of x normalised to sum 1. 1 (collapsed) to min(n, d).

    Garrido et al., 2023, https://arxiv.org/abs/2210.02885, equation 1. 0 for an all-zero x.
    """
    return _effective_rank(np.linalg.svd(np.asarray(x, dtype=np.float64), compute_uv=False))


def feature_std(x: np.ndarray) -> float:
    """Mean over dimensions of the standard deviation of unit rows: 0 when collapsed, 1/sqrt(d) when spread evenly.

    Chen and He (SimSiam), 2021, https://arxiv.org/abs/2011.10566, figure 2.
    """
    return float(_unit(x).std(axis=0).mean())


def alignment(x: np.ndarray, y: np.ndarray, alpha: float = 2.0) -> float:
    """Mean ||x_i - y_i||^alpha over positive pairs of unit rows, x and y (n, d). 0 is perfect.

    Wang and Isola, 2020, https://arxiv.org/abs/2005.10242.
    """
    return float((np.linalg.norm(_unit(x) - _unit(y), axis=1) ** alpha).mean())


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """log of the mean over pairs i < j of exp(-t ||x_i - x_j||^2), unit rows, n >= 2. 0 when collapsed, else below.

    Wang and Isola, 2020, https://arxiv.org/abs/2005.10242. Memory is O(n^2): give a sample.
    """
    unit = _unit(x)
    squared = np.maximum(2 - 2 * (unit @ unit.T), 0)
    return float(np.log(np.exp(-t * squared[np.triu_indices(len(unit), k=1)]).mean()))


def lidar(views: np.ndarray, delta: float = 1e-4) -> float:
    """LiDAR: the effective rank of the discriminant between samples, views (n, q, d) being q >= 2 views of n samples.

    S_b is the covariance of the samples' means, S_w that of the views around them plus delta I; the measure is
    exp(entropy) of the normalised eigenvalues of S_w^-1/2 S_b S_w^-1/2.
    Thilak et al., 2024, https://arxiv.org/abs/2312.04000, section 4.
    """
    views = np.asarray(views, dtype=np.float64)
    n, q, d = views.shape
    means = views.mean(axis=1)  # (n, d)
    between = means - means.mean(axis=0)
    within = (views - means[:, None]).reshape(n * q, d)
    s_b = between.T @ between / (n - 1)
    s_w = within.T @ within / (n * (q - 1)) + delta * np.eye(d)
    values, vectors = np.linalg.eigh(s_w)
    whiten = (vectors / np.sqrt(values)) @ vectors.T
    return _effective_rank(np.maximum(np.linalg.eigvalsh(whiten @ s_b @ whiten), 0))


def alpha_req(x: np.ndarray) -> float:
    """alpha-ReQ: the power-law exponent of the covariance's spectrum, lambda_i ~ i^-alpha; near 1 is healthy.

    The least-squares slope of log lambda_i on log i over the non-zero eigenvalues; infinite where fewer than two are.
    Agrawal et al., 2022, https://openreview.net/forum?id=ii9X4vtZGTZ.
    """
    x = np.asarray(x, dtype=np.float64)
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    values = values[values > values[0] * 1e-12]
    if len(values) < 2:
        return float("inf")
    slope, _ = np.polyfit(np.log(np.arange(1, len(values) + 1)), np.log(values), 1)
    return float(-slope)
