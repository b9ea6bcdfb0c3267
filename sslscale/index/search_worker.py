"""An open shard, searched: all of its vectors, or those that a filter and the deletions leave."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np

from sslscale import storage
from sslscale.features import FeatureSet
from sslscale.features.distance import to_distance
from sslscale.features.files import allow_open_files, open_npy
from sslscale.index.exact import BLOCK_ROWS, RowReference, exact_knn
from sslscale.index.factory import Effort, on_gpu, search_parameters, takes_parameters
from sslscale.index.filters import Filter
from sslscale.index.record import ROW, IndexRecord, ShardFiles
from sslscale.index.shard import OPEN
from sslscale.index.widen import Kept


@dataclass(frozen=True)
class Request:
    """Queries (n, D) as `prepared` gives them, and what is looked for; `where` is a filter's text."""

    x: np.ndarray
    k: int
    effort: Effort
    where: str | None = None


@dataclass(frozen=True)
class Found:
    """The nearest vectors: distances fp32 and row ids int64, (n, k), nearest first; inf and -1 where there are no more.

    `kept` vectors were looked among: those neither deleted nor filtered out.
    """

    distances: np.ndarray
    ids: np.ndarray
    kept: int


class Shard:
    """A shard that is open for searching. `numbers` are what the parts of the index are called in the features."""

    def __init__(
        self, record: IndexRecord, files: ShardFiles, features: FeatureSet, numbers: np.ndarray, device: str
    ) -> None:
        self.features, self.metric, self._numbers = features, record.result["metric"], numbers
        self.index = faiss.read_index(str(storage.bring(record.path / files.index)), OPEN)
        self._device = device
        self._rows = open_npy(record.path / files.rows)
        self._deleted = record.deleted
        self._filtered: tuple[str, Kept] | None = None  # of the last filter

    def search(self, request: Request) -> Found:
        """Vectors that a filter keeps are compared one by one where that is less work than looking into the index."""
        x, kept = request.x, self._kept(request.where)
        if not self.num_kept(request.where):
            return _padded(np.empty((len(x), 0)), np.empty((len(x), 0), np.int64), request.k, 0)
        if kept is None:
            found = self._look(self._fast, x, min(request.k, len(self._rows)), request.effort, None)
            return _padded(*found, request.k, len(self._rows))
        k = min(request.k, kept.count)
        distances, ids = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
        left = np.ones(len(x), dtype=bool)
        for look in kept.looks(x, request.effort, k):
            found = self._look(self.index, x[look.queries], look.k, look.effort, kept.selector)
            distances[look.queries], ids[look.queries] = (array[:, :k] for array in found)
            left[look.queries] = (found[1] < 0).any(axis=1)  # there are more than it came across
        if left.any():
            distances[left], ids[left] = self._compare(x[left], k, request.where)
        return _padded(distances, ids, request.k, kept.count)

    @cached_property
    def _fast(self) -> faiss.Index:
        return on_gpu(self.index) if self._device == "cuda" else self.index

    def _look(
        self, index: faiss.Index, x: np.ndarray, k: int, effort: Effort, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        takes = takes_parameters(self.index)
        options = {"params": search_parameters(self.index, effort, selector)} if takes else {}
        squared, at = index.search(x, k, **options)
        distances = np.where(at < 0, np.inf, to_distance(np.maximum(squared, 0), self.metric))
        return distances, np.where(at < 0, -1, self._row_ids(np.maximum(at, 0)))

    def num_kept(self, where: str | None = None) -> int:
        kept = self._kept(where)
        return len(self._rows) if kept is None else kept.count

    def row_ids(self, where: str | None = None) -> Iterator[np.ndarray]:
        """The row ids of the vectors that are kept, in the shard's order, BLOCK_ROWS of its vectors at a time."""
        kept = self._kept(where)
        for start in range(0, len(self._rows), BLOCK_ROWS):
            at = np.arange(start, min(start + BLOCK_ROWS, len(self._rows)))
            yield self._row_ids(at if kept is None else at[kept.mask[at]])

    def _compare(self, x: np.ndarray, k: int, where: str | None) -> tuple[np.ndarray, np.ndarray]:
        reference = RowReference(self.features, lambda: self.row_ids(where))
        return exact_knn(x, np.full(len(x), -1), reference, k, self.metric)

    def _row_ids(self, at: np.ndarray) -> np.ndarray:
        own = self._rows[at]
        return self._numbers[own >> 32] << 32 | own & ROW

    def _kept(self, where: str | None) -> Kept | None:
        """The vectors that are neither deleted nor filtered out; None where that is all of them."""
        if where is None:
            return self._live
        if self._filtered is None or self._filtered[0] != where:
            self._filtered = (where, Kept(self.index, self._filter(where)))
        return self._filtered[1]

    @cached_property
    def _live(self) -> Kept | None:
        mask = _without(self._rows, self._deleted)
        return None if mask is None else Kept(self.index, mask)

    def _filter(self, where: str) -> np.ndarray:
        condition = Filter(where, self.features)
        mask = np.ones(len(self._rows), dtype=bool) if self._live is None else self._live.mask.copy()
        bounds = np.searchsorted(self._rows, np.arange(len(self._numbers) + 1) << 32)
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                kept = condition.mask(self.features.parts[self._numbers[number]])
                mask[start:stop] &= kept[self._rows[start:stop] & ROW]
        return mask


def _without(rows: np.ndarray, deleted: np.ndarray) -> np.ndarray | None:
    """(n,) bool: which of `rows` are not deleted, both ascending; None where all are left."""
    at = np.searchsorted(rows, deleted)
    held = at < len(rows)
    at = at[held][rows[at[held]] == deleted[held]]
    if not len(at):
        return None
    live = np.ones(len(rows), dtype=bool)
    live[at] = False
    return live


def _padded(distances: np.ndarray, ids: np.ndarray, k: int, kept: int) -> Found:
    missing = ((0, 0), (0, k - ids.shape[1]))
    distances = np.pad(distances.astype(np.float32), missing, constant_values=np.inf)
    return Found(distances, np.pad(ids, missing, constant_values=-1), kept)


class SearchWorker:
    """Searches the shards of one index.

    Those on this machine are opened at once, so that later states of the index, which remove the files of earlier ones,
    do not end a search; those on a store when they are first asked for.
    """

    def __init__(self, *, record: IndexRecord, features: dict[str, str], device: str = "cpu") -> None:
        self.record, self.features, self.device = record, FeatureSet.open(features), device
        self._numbers = record.numbers(self.features)
        self._open: dict[int, Shard] = {}
        allow_open_files()
        if storage.remote_url(record.path) is None:
            for number in range(len(record.shards)):
                self.shard(number)

    def shard(self, number: int) -> Shard:
        if number not in self._open:
            files = self.record.shards[number]
            self._open[number] = Shard(self.record, files, self.features, self._numbers, self.device)
        return self._open[number]

    def search(self, number: int, request: Request) -> Found:
        return self.shard(number).search(request)

    def num_kept(self, number: int, where: str) -> int:
        return self.shard(number).num_kept(where)


def nearest_of(found: Sequence[Found], k: int) -> Found:
    """The k nearest of what several shards found; equal distances are ordered by row id."""
    if len(found) == 1:
        return found[0]
    distances, ids = (np.concatenate([getattr(one, name) for one in found], axis=1) for name in ("distances", "ids"))
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Found(
        np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1), sum(one.kept for one in found)
    )
