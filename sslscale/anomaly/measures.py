"""How well scores tell anomalies from normal samples; labels measure, they never choose.

`scores` is (N,), higher is more anomalous; `anomalous` is bool (N,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


def anomaly_measures(
    scores: np.ndarray, labels: np.ndarray | None, normal_labels: Sequence[int] | None
) -> dict[str, Any]:
    """`auroc, average_precision`, with every label outside `normal_labels` an anomaly.

    Each is None without labels, without `normal_labels`, or with only one of the two kinds. AUROC is the probability
    that an anomaly scores above a normal sample, ties counting half; 0.5 is chance. Average precision is the mean
    precision over the anomalies, from the highest score down; its chance level is their share.
    """
    nothing = dict.fromkeys(("auroc", "average_precision"))
    if labels is None or normal_labels is None:
        return nothing
    anomalous = ~np.isin(labels, np.asarray(normal_labels))
    if anomalous.all() or not anomalous.any():
        return nothing
    return {
        "auroc": float(roc_auc_score(anomalous, scores)),
        "average_precision": float(average_precision_score(anomalous, scores)),
    }
