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
from sslscale.index.record import ROW, IndexRecord
from sslscale.index.search_worker import Request, SearchWorker, nearest_of
from sslscale.index.shard import prepared
from sslscale.rundir import RunDir, write_json
from sslscale.runtime.base import Pool, Resources, Runtime


class Index:
    """The index `name` of a run, with the features that it was built from."""

    def __init__(self, run: RunDir, record: IndexRecord, device: str = "cpu", *, pooled: bool = False) -> None:
        self._run, self.device, self._pooled = run, device, pooled
        self._pool: Pool | None = None
        self._closing = contextlib.ExitStack()
        self._use(record)

    def _use(self, record: IndexRecord) -> None:
        self.record, self.metric = record, str(record.result["metric"])
        self.features: FeatureSet = open_features(self._run, record.result["datasets"])
        record.numbers(self.features)
        if not self._pooled:
            self._worker = SearchWorker(record=record, features=self.features.paths, device=self.device)

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
        """A finished index; its files are memory-mapped, or copied to a GPU. A runtime's workers search the shards.

        It answers as it is now, also while others change it; open it again to see that.

        UserError if there is none, or if the run's features are others by now; StageError if a file is cut off.
        """
        run = run if isinstance(run, RunDir) else RunDir.reading(run)
        record = IndexRecord.open(run, name)
        index = cls(run, record, device, pooled=runtime is not None)
        if runtime is not None:
            setup = {"record": record, "features": index.features.paths, "device": device}
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
        if not self.has_place(x).all():
            raise UserError("a query is zero: it has no direction, so it has no cosine with anything")
        self.check_k(k)

    def has_place(self, x: np.ndarray) -> np.ndarray:
        """(n,) bool: which rows of x (n, D) have distances; under "cosine" a zero has no direction."""
        return (self.metric != "cosine") | (x != 0).any(axis=1)

    def check_k(self, k: int, where: str | None = None) -> None:
        """UserError for more neighbours than there are vectors (that a filter keeps), or for a malformed filter."""
        if not 1 <= k <= self.num_vectors:
            raise UserError("k is not between 1 and the number of vectors", got=k, allowed=f"1 to {self.num_vectors}")
        if where is not None and k > (kept := self.num_kept(where)):
            raise UserError("k is above the number of vectors that the filter keeps", got=k, allowed=kept)

    def num_kept(self, where: str | None = None) -> int:
        """How many vectors there are to be found that a filter keeps."""
        if where is None:
            return self.num_vectors
        shards = range(len(self.record.shards))
        if self._pool is None:
            return sum(self._worker.num_kept(number, where) for number in shards)
        return sum(dict(self._pool.map("num_kept", shards, where)).values())

    def keys(self, row_ids: np.ndarray) -> list[str]:
        """The keys of row ids (n,), none of them -1."""
        return self.features.keys_of(row_ids)

    def delete(self, keys: Sequence[str], dataset: str | None = None) -> int:
        """Takes samples out: from now on no search returns them. Returns how many were there until now.

        They are marked; `compact` frees their space. Hold the run directory (`with RunDir(...)`) meanwhile. UserError
        for a key that is unknown or not indexed yet, and then none is deleted.
        """
        if self._pool is not None:
            raise UserError("an index that workers have open cannot be changed", fix="open it without a runtime")
        latest = self.record.renewed()
        if latest != self.record:  # others have added to it or deleted since it was opened
            self._use(latest)
        row_ids = np.array([self.features.lookup(key, dataset) for key in keys], dtype=np.int64)
        own = {int(number): place for place, number in enumerate(self.record.numbers(self.features))}
        for key, row in zip(keys, row_ids, strict=True):
            if int(row >> 32) not in own:
                raise UserError(
                    "a sample is embedded and not indexed yet: what is deleted is taken out of an index",
                    got=key,
                    fix="sslscale index adds it, then delete it",
                )
        marked = [own[int(row >> 32)] << 32 | int(row & ROW) for row in row_ids]
        deleted = np.union1d(self.record.deleted, np.array(marked, dtype=np.int64))
        file = f"deleted-{self.record.result['state']}-{len(deleted)}.npy"
        write_npy(self.record.path / file, deleted)
        before = self.num_vectors
        self._use(self.record.updated(deleted=file))
        shards = range(len(self.record.shards))
        left = sum(self._worker.shard(number).num_kept() for number in shards)
        gone = sum(part.rows for part in self.record.parts) - left
        self.record = self.record.updated(num_vectors=left, num_deleted=gone)
        write_json(self.record.path / "result.json", self.record.result)
        self.record.remove_others()
        return before - left
