"""The two metrics, in one place: every consumer searches by squared L2 on prepared rows, then converts.

On unit vectors ||x - y||^2 = 2 (1 - cos(x, y)), so cosine is L2 on normalised rows and needs no path of its own.
"""

from __future__ import annotations

import numpy as np


def prepare(rows: np.ndarray, metric: str) -> np.ndarray:
    """Rows (n, D) as the metric compares them: at least fp32, and of unit length under "cosine" (a zero row stays)."""
    rows = np.asarray(rows, dtype=np.result_type(rows.dtype, np.float32))
    if metric == "l2":
        return rows
    assert metric == "cosine", metric
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def to_distance(squared: np.ndarray, metric: str) -> np.ndarray:
    """Squared L2 of prepared rows -> the distance that users see: Euclidean under "l2", 1 - cosine under "cosine"."""
    return np.sqrt(squared) if metric == "l2" else squared / 2


def to_objective(squared: float, metric: str) -> float:
    """A sum of squared L2 of prepared rows -> the sum of squared distances under "l2", of 1 - cosine under "cosine"."""
    return float(squared if metric == "l2" else squared / 2)
