"""kNN anomaly scores: the mean distance to the k nearest reference rows (Angiulli and Pizzuti, 2002).

An estimator on arrays, and the workers that score the parts of a feature store by the same search.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from sslscale.errors import UserError
from sslscale.features import FeatureSet
from sslscale.features.files import write_npy
from sslscale.index.all_pairs import Neighbours
from sslscale.index.exact import ArrayReference, SetReference, exact_knn

METRICS = ("l2", "cosine")


class KNNAnomaly(BaseEstimator):
    """Scores rows by their mean distance to the k nearest rows of the training set.

    Higher is more anomalous, as in PyOD; scikit-learn's outlier detectors have the opposite sign. `metric` is "l2"
    (Euclidean) or "cosine" (1 - cosine).

    Fitted: `scores_` fp32 (N,), the training rows' own scores, each row left out of its own neighbours by its index
    (duplicates of it stay), and `neighbors_` int64 (N, k), those neighbours, nearest first.
    """

    def __init__(self, k: int = 5, *, metric: str = "l2") -> None:
        self.k = k
        self.metric = metric

    def fit(self, X: Any, y: None = None) -> KNNAnomaly:
        """Keeps X (N, D), finite, as the reference. UserError (a ValueError) unless 1 <= k < N."""
        X = validate_data(self, X, dtype=np.float32)
        if self.metric not in METRICS:
            raise UserError("unknown metric", got=self.metric, allowed=", ".join(METRICS))
        check_k(self.k, len(X))
        self._reference = ArrayReference(X)
        own = np.arange(len(X))
        distances, self.neighbors_ = exact_knn(X, own, self._reference, self.k, self.metric)
        self.scores_ = distances.mean(axis=1)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """fp32 (n,), higher is more anomalous, of rows X (n, D) that are not in the training set.

        A row that is in it finds itself at distance 0: `scores_` holds the training rows' scores.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        nobody = np.full(len(X), -1)
        return exact_knn(X, nobody, self._reference, self.k, self.metric)[0].mean(axis=1)


def check_k(k: int, num_reference: int) -> None:
    """Raises UserError unless there are more reference rows than neighbours."""
    if not 1 <= k < num_reference:
        raise UserError(
            "k must be positive and below the number of reference samples",
            got=f"k = {k}, n_samples = {num_reference}",
            allowed=f"1 to {num_reference - 1}",
            fix="set a smaller k, or give more reference samples",
        )


class KNNWorker:
    """Scores parts of a feature set against a reference set; both are given as a set's `paths`.

    `output` is the stage's folder. A part's scores depend on the part and the reference alone. `neighbours` is the
    folder of a finished all-pairs search of the set in itself, whose neighbours are then taken instead of searching.
    """

    def __init__(
        self,
        features: Mapping[str, str],
        reference: Mapping[str, str],
        k: int,
        metric: str,
        output: str,
        neighbours: str | None = None,
    ) -> None:
        self.features, self.reference = FeatureSet.open(features), FeatureSet.open(reference)
        self.k, self.metric, self.output = k, metric, Path(output)
        self.found = None if neighbours is None else Neighbours(Path(neighbours), self.features)

    def score(self, number: int, broadcast: None) -> dict[str, Any]:
        """Writes the scores and the neighbours of part `number`; returns how many rows it has."""
        part = self.features.parts[number]
        distances, ids = self._search(number) if self.found is None else self.found.block(number)
        write_npy(self.output / "scores" / part.file, distances.mean(axis=1))
        write_npy(self.output / "neighbours" / part.file, ids)
        return {"rows": part.rows}

    def _search(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        own_ids = own_reference_ids(self.features, number, self.reference)
        return exact_knn(self.features.block(number), own_ids, SetReference(self.reference), self.k, self.metric)


def own_reference_ids(features: FeatureSet, number: int, reference: FeatureSet) -> np.ndarray:
    """For each row of part `number`, the row id that it has in the reference, or -1 if it is not in it: int64 (n,)."""
    part = features.parts[number]
    for other in reference.parts:
        if (other.dataset, other.part) == (part.dataset, part.part):
            return other.number << 32 | np.arange(part.rows, dtype=np.int64)
    return np.full(part.rows, -1, dtype=np.int64)
