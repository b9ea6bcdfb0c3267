"""Searching an index: from Python, and by the key of a sample."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.features.distance import prepare, to_distance
from sslscale.rundir import RunDir, read_json


class Index:
    """The index `name` of a run, with the features that it was built from."""

    def __init__(self, index: faiss.Index, metric: str, features: FeatureSet) -> None:
        self.index, self.metric, self.features = index, metric, features

    @classmethod
    def open(cls, run: RunDir, name: str = "main") -> Index:
        """A finished index; UserError if there is none, or if the run's features are others by now."""
        path = run.stage_path("index", name)
        if not (path / "result.json").is_file():
            raise UserError(
                "this run has no such index",
                got=str(path),
                fix=f"sslscale index -c CONFIG --run {run.path} --name {name}",
            )
        result, parents = read_json(path / "result.json"), read_json(path / "stage.json")["parents"]
        features = open_features(run, result["datasets"])
        if features.identity != parents["features"]:
            raise UserError(
                "the index was built from other features than the run has now",
                got=features.identity,
                allowed=parents["features"],
                fix=f"sslscale index -c CONFIG --run {run.path} --name {name} --overwrite",
            )
        return cls(faiss.read_index(str(path / "index.faiss")), result["metric"], features)

    @property
    def num_vectors(self) -> int:
        return self.index.ntotal

    def search(self, x: np.ndarray, k: int, *, backbone: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Distances (fp32) and row ids (int64) of the k nearest vectors of each row of x (n, D): both (n, k).

        The distance is Euclidean, or 1 - cosine; nearest first. Inverted lists may hold fewer than k in the lists
        that were probed: then ids end in -1. `backbone` is the hash of what made x, where it is known.
        Raises UserError for another dimension, another backbone, non-finite values, or k above the number of vectors.
        """
        x = np.atleast_2d(x)
        if x.shape[1] != self.features.dim:
            raise UserError("queries have another dimension than the index", got=x.shape[1], allowed=self.features.dim)
        if backbone is not None and backbone != self.features.backbone:
            raise UserError(
                "queries were made by another backbone than the index",
                got=backbone,
                allowed=self.features.backbone,
                fix="embed the queries with the backbone of the indexed features",
            )
        if not np.isfinite(x).all():
            raise UserError("queries hold values that are not finite")
        if not 1 <= k <= self.num_vectors:
            raise UserError("k is not between 1 and the number of vectors", got=k, allowed=f"1 to {self.num_vectors}")
        found, ids = self.index.search(np.ascontiguousarray(prepare(x, self.metric), dtype=np.float32), k)
        # faiss gives inner products under "cosine"; on unit vectors ||x - y||^2 = 2 - 2 x.y
        squared = np.maximum(2 - 2 * found if self.metric == "cosine" else found, 0)
        return to_distance(squared, self.metric), ids

    def keys(self, row_ids: np.ndarray) -> list[str]:
        """The keys of row ids (n,), none of them -1."""
        return self.features.keys_of(row_ids)


def run_search(
    run: RunDir, *, key: str, k: int = 10, name: str = "main", dataset: str | None = None
) -> list[dict[str, Any]]:
    """The k nearest neighbours of an indexed sample, itself left out: `{"key", "dataset", "distance"}`, nearest first.

    `dataset` says which sample is meant where several datasets have the key. UserError for an unknown key.
    """
    index = Index.open(run, name)
    own = index.features.lookup(key, dataset)
    if not 1 <= k < index.num_vectors:
        raise UserError("k is not below the number of vectors", got=k, allowed=f"1 to {index.num_vectors - 1}")
    distances, ids = index.search(index.features.take(np.array([own])), k + 1)
    kept = np.flatnonzero((ids[0] != own) & (ids[0] >= 0))[:k]
    records = index.features.records(ids[0, kept], ["key"])
    return [
        {"key": record["key"], "dataset": record["dataset"], "distance": float(distance)}
        for record, distance in zip(records, distances[0, kept], strict=True)
    ]
