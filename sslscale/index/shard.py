"""A shard: one faiss index over some parts. Workers build them, each from its parts alone, and search them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from sslscale import storage
from sslscale.features import FeatureSet
from sslscale.features.distance import prepare, to_distance
from sslscale.features.files import open_npy, replacing, write_npy
from sslscale.index.exact import BLOCK_ROWS, RowReference, exact_knn
from sslscale.index.factory import Effort, on_gpus, search_parameters, selector_of, takes_parameters, widened
from sslscale.index.filters import Filter
from sslscale.index.record import IndexRecord, ShardFiles

ADD_ROWS = 65536  # rows added at once: enough for the products to run at full speed
ROW = 0xFFFFFFFF  # the lower half of a row id
OPEN = faiss.IO_FLAG_MMAP_IFC  # searched from the pages of its file, which all that open it share


@dataclass(frozen=True)
class Group:
    """What a shard is built from: `(number in the index, number in the features)` of parts, and the rows left out.

    `name` says all of it, so a file of this name is the shard. `base` is the file of the index that the rows are added
    to, and `base_rows` that of its row ids.
    """

    name: str
    rows: int
    parts: Sequence[tuple[int, int]]
    left_out: np.ndarray
    base: str = "trained.faiss"
    base_rows: str | None = None


class BuildWorker:
    """Builds shards into `folder`/shards. `features` are the paths of a feature set."""

    def __init__(self, *, folder: str, features: dict[str, str], metric: str) -> None:
        self.folder, self.metric = Path(folder), metric
        self.features = FeatureSet.open(features)

    def build(self, group: Group, broadcast: Any = None) -> dict[str, Any]:
        """Writes a shard, its row ids first; returns the record of its files."""
        index = faiss.read_index(str(storage.bring(self.folder / group.base)))
        row_ids = [open_npy(self.folder / group.base_rows) if group.base_rows else np.empty(0, np.int64)]
        for number, part in group.parts:
            for start in range(0, self.features.parts[part].rows, ADD_ROWS):
                rows = self.features.block(part, start, start + ADD_ROWS)
                own = (number << 32) + np.arange(start, start + len(rows))
                kept = ~np.isin(own, group.left_out)
                index.add(prepared(rows if kept.all() else rows[kept], self.metric))
                row_ids.append(own[kept])
        files = (f"shards/{group.name}.npy", f"shards/{group.name}.faiss")
        write_npy(self.folder / files[0], np.concatenate(row_ids))
        write_index(index, self.folder / files[1])
        return shard_record(self.folder, index.ntotal, index=files[1], rows=files[0])


def prepared(rows: np.ndarray, metric: str) -> np.ndarray:
    return np.ascontiguousarray(prepare(rows, metric), dtype=np.float32)


def write_index(index: faiss.Index, path: Path) -> None:
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))


def shard_record(folder: Path, vectors: int, *, index: str, rows: str) -> dict[str, Any]:
    """What result.json says of a shard, see `ShardFiles`."""
    sizes = {file: (folder / file).stat().st_size for file in (index, rows)}
    return {"vectors": int(vectors), "index": index, "rows": rows, "sizes": sizes}


# ------------------------------------------------------------------ search


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
    """A shard that is open for searching."""

    def __init__(self, record: IndexRecord, files: ShardFiles, features: FeatureSet, device: str) -> None:
        self.features, self.metric = features, record.result["metric"]
        self.index = faiss.read_index(str(storage.bring(record.path / files.index)), OPEN)
        self._fast = on_gpus(self.index) if device == "cuda" else self.index
        self._rows = open_npy(record.path / files.rows)
        self._numbers = record.numbers(features)
        self._live = _without(self._rows, record.deleted)
        self._filtered: tuple[str, np.ndarray] | None = None  # of the last filter

    def search(self, request: Request) -> Found:
        """Those that a filter keeps are compared one by one where that is less work than looking into the index."""
        mask, kept = self._mask(request.where), self.num_kept(request.where)
        if not kept:
            return _padded(np.empty((len(request.x), 0)), np.empty((len(request.x), 0), np.int64), request.k, kept)
        effort = widened(self.index, request.effort, kept)
        if effort is None:
            return self._compare(request, kept)
        options = {}
        if takes_parameters(self.index):
            selector = None if mask is None else selector_of(mask)
            options["params"] = search_parameters(self.index, effort, selector)
        index = self._fast if mask is None else self.index  # GPUs take no selector
        squared, at = index.search(request.x, min(request.k, len(self._rows)), **options)
        distances = np.where(at < 0, np.inf, to_distance(np.maximum(squared, 0), self.metric))
        ids = np.where(at < 0, -1, self._row_ids(np.maximum(at, 0)))
        return _padded(distances, ids, request.k, kept)

    def num_kept(self, where: str | None = None) -> int:
        mask = self._mask(where)
        return len(self._rows) if mask is None else int(mask.sum())

    def row_ids(self, where: str | None = None) -> Iterator[np.ndarray]:
        """The row ids of the vectors that are kept, in the shard's order, BLOCK_ROWS of its vectors at a time."""
        mask = self._mask(where)
        for start in range(0, len(self._rows), BLOCK_ROWS):
            at = np.arange(start, min(start + BLOCK_ROWS, len(self._rows)))
            yield self._row_ids(at if mask is None else at[mask[at]])

    def _compare(self, request: Request, kept: int) -> Found:
        nobody = np.full(len(request.x), -1)
        reference = RowReference(self.features, lambda: self.row_ids(request.where))
        distances, ids = exact_knn(request.x, nobody, reference, min(request.k, kept), self.metric)
        return _padded(distances, ids, request.k, kept)

    def _row_ids(self, at: np.ndarray) -> np.ndarray:
        own = self._rows[at]
        return self._numbers[own >> 32] << 32 | own & ROW

    def _mask(self, where: str | None) -> np.ndarray | None:
        """(vectors,) bool: those that are neither deleted nor filtered out; None where that is all of them."""
        if where is None:
            return self._live
        if self._filtered is None or self._filtered[0] != where:
            self._filtered = (where, self._filter(where))
        return self._filtered[1]

    def _filter(self, where: str) -> np.ndarray:
        condition = Filter(where, self.features)
        mask = np.ones(len(self._rows), dtype=bool) if self._live is None else self._live.copy()
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
    """Searches the shards of one index, each opened when it is first asked for."""

    def __init__(self, *, record: IndexRecord, features: dict[str, str], device: str = "cpu") -> None:
        self.record, self.features, self.device = record, FeatureSet.open(features), device
        self._open: dict[int, Shard] = {}

    def shard(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = Shard(self.record, self.record.shards[number], self.features, self.device)
        return self._open[number]

    def search(self, number: int, request: Request) -> Found:
        return self.shard(number).search(request)


def nearest_of(found: Sequence[Found], k: int) -> Found:
    """The k nearest of what several shards found; equal distances are ordered by row id."""
    if len(found) == 1:
        return found[0]
    distances, ids = (np.concatenate([getattr(one, name) for one in found], axis=1) for name in ("distances", "ids"))
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Found(
        np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1), sum(one.kept for one in found)
    )
