"""Searching an index: from Python, and by the key of a sample, an image or vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.features.files import write_npy
from sslscale.index.factory import Effort
from sslscale.index.record import IndexRecord
from sslscale.index.shard import ROW, Request, SearchWorker, nearest_of, prepared
from sslscale.rundir import RunDir, write_json
from sslscale.runtime.base import Pool, Resources, Runtime


class Index:
    """The index `name` of a run, with the features that it was built from."""

    def __init__(self, record: IndexRecord, features: FeatureSet, device: str = "cpu") -> None:
        self.record, self.features, self.device = record, features, device
        self.metric: str = record.result["metric"]
        self._worker = SearchWorker(record=record, features=features.paths, device=device)
        self._pool: Pool | None = None
        self._closing = contextlib.ExitStack()

    @classmethod
    def open(
        cls,
        run: RunDir | str | Path,
        name: str = "main",
        *,
        runtime: Runtime | None = None,
        workers: int = 1,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> Index:
        """A finished index; its files are memory-mapped, or copied to all GPUs. A runtime's workers search the shards.

        UserError if there is none, or if the run's features are others by now; StageError if a file is cut off.
        """
        run = run if isinstance(run, RunDir) else RunDir.reading(run)
        record = IndexRecord.open(run, name)
        features = open_features(run, record.result["datasets"])
        record.numbers(features)
        index = cls(record, features, device)
        if runtime is not None:
            setup = {"record": record, "features": features.paths, "device": device}
            resources = Resources(gpus=1.0 if device == "cuda" else 0.0)
            workers = min(workers, len(record.shards))
            index._pool = index._closing.enter_context(runtime.pool(SearchWorker, setup, workers, resources))
        return index

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    @property
    def num_vectors(self) -> int:
        """How many there are to be found: without the deleted."""
        return self.record.result["num_vectors"]

    def search(
        self,
        x: np.ndarray,
        k: int,
        *,
        where: str | None = None,
        backbone: str | None = None,
        effort: Effort | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances (fp32) and row ids (int64) of the k nearest vectors of each row of x (n, D): both (n, k).

        The distance is Euclidean, or 1 - cosine, by the index's codes; nearest first. Under "cosine" the length of a
        query does not matter: it is normalised here, as the indexed rows were. Inverted lists may hold fewer than k in
        the lists that were probed: then ids end in -1 and distances in inf.

        `where` keeps some rows, see `sslscale.index.filters`; `backbone` is the hash of what made x, where it is
        known; `effort` replaces the one that reached the wanted recall.
        Raises UserError for another dimension, another backbone, values that are not finite, a zero vector under
        "cosine", a malformed filter, or k above the number of vectors that are kept.
        """
        x = np.atleast_2d(x)
        self._check(x, k, backbone)
        request = Request(prepared(x, self.metric), k, effort or self.record.effort, where)
        shards = range(len(self.record.shards))
        if self._pool is None:
            found = nearest_of([self._worker.search(number, request) for number in shards], k)
        else:
            answers = dict(self._pool.map("search", shards, request))
            found = nearest_of([answers[number] for number in shards], k)
        if k > found.kept:
            raise UserError("k is above the number of vectors that the filter keeps", got=k, allowed=found.kept)
        return found.distances, found.ids

    def _check(self, x: np.ndarray, k: int, backbone: str | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.features.dim:
            raise UserError("queries have another dimension than the index", got=x.shape[-1], allowed=self.features.dim)
        if backbone is not None and backbone != self.features.backbone:
            raise UserError(
                "queries were made by another backbone than the index",
                got=backbone,
                allowed=self.features.backbone,
                fix="embed the queries with the backbone of the indexed features",
            )
        if not np.isfinite(x).all():
            raise UserError("queries hold values that are not finite")
        if self.metric == "cosine" and not x.any(axis=1).all():
            raise UserError("a query is zero: it has no direction, so it has no cosine with anything")
        self.check_k(k)

    def check_k(self, k: int) -> None:
        """UserError for more neighbours than there are vectors."""
        if not 1 <= k <= self.num_vectors:
            raise UserError("k is not between 1 and the number of vectors", got=k, allowed=f"1 to {self.num_vectors}")

    def keys(self, row_ids: np.ndarray) -> list[str]:
        """The keys of row ids (n,), none of them -1."""
        return self.features.keys_of(row_ids)

    def delete(self, keys: Sequence[str], dataset: str | None = None) -> int:
        """Takes samples out: from now on no search returns them. Returns how many were there until now.

        They are marked; `compact` frees their space. Hold the run directory (`with RunDir(...)`) meanwhile. UserError
        for an unknown key, and then none is deleted.
        """
        if self._pool is not None:
            raise UserError("an index that workers have open cannot be changed", fix="open it without a runtime")
        row_ids = np.array([self.features.lookup(key, dataset) for key in keys], dtype=np.int64)
        own = {int(number): place for place, number in enumerate(self.record.numbers(self.features))}
        marked = [own[int(row >> 32)] << 32 | int(row & ROW) for row in row_ids if int(row >> 32) in own]
        deleted = np.union1d(self.record.deleted, np.array(marked, dtype=np.int64))
        file = f"deleted-{self.record.result['state']}-{len(deleted)}.npy"
        write_npy(self.record.path / file, deleted)
        before = self.num_vectors
        self.record = self.record.updated(deleted=file)
        self._worker = SearchWorker(record=self.record, features=self.features.paths, device=self.device)
        shards = range(len(self.record.shards))
        left = sum(self._worker.shard(number).num_kept() for number in shards)
        gone = sum(part.rows for part in self.record.parts) - left
        self.record = self.record.updated(num_vectors=left, num_deleted=gone)
        write_json(self.record.path / "result.json", self.record.result)
        self.record.remove_others()
        return before - left
