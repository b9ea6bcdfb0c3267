"""The four passes of the all-pairs search, each over parts or over groups of lists.

assign  part   its rows sorted by list, and the lists that each of them probes
sort    group  the rows of a group of consecutive lists, from every part, list after list
search  group  the neighbours of these rows in the lists that they probe
gather  part   the neighbours of the part's rows, in the order of the part

n rows of a part, m rows of a group, L lists, P parts, D dimensions, k neighbours. A row's place is its position when
all rows are laid out by list, then part, then row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from sslscale.features import FeatureSet
from sslscale.features.distance import prepare
from sslscale.features.files import open_npy, write_npy
from sslscale.index.exact import SetReference, exact_knn, rescore

CHUNK_ROWS = 4096
OPEN_GROUPS = 64  # whose files a search keeps open


def part_file(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}"


class Layout:
    """Where every row lies by list, from the bounds (P, L + 1) of each list within each part's sorted rows.

    Groups are consecutive lists of about `group_rows` rows.
    """

    def __init__(self, bounds: np.ndarray, group_rows: int) -> None:
        self.bounds = bounds
        self.counts = np.diff(bounds, axis=1)  # (P, L)
        per_list = self.counts.sum(axis=0)
        self.list_start = np.concatenate([[0], np.cumsum(per_list)])  # (L + 1,)
        self._block_start = self.list_start[:-1] + np.cumsum(self.counts, axis=0) - self.counts  # (P, L)
        full = np.searchsorted(self.list_start, np.arange(group_rows, self.list_start[-1], group_rows))
        self.groups = np.unique([0, *full.tolist(), len(per_list)])  # (G + 1,): the first list of each group

    @property
    def num_groups(self) -> int:
        return len(self.groups) - 1

    def lists_of(self, group: int) -> slice:
        return slice(int(self.groups[group]), int(self.groups[group + 1]))

    def rows_of(self, group: int) -> tuple[int, int]:
        """The places [start, stop) of a group's rows."""
        lists = self.lists_of(group)
        return int(self.list_start[lists.start]), int(self.list_start[lists.stop])

    def places(self, part: int, lists: slice) -> np.ndarray:
        """The places of a part's sorted rows that are in these lists."""
        counts, first = self.counts[part, lists], self.bounds[part, lists.start]
        shift = self._block_start[part, lists] - self.bounds[part, lists]
        return np.repeat(shift, counts) + np.arange(first, first + counts.sum())


class AllPairsWorker:
    """Works in the stage's `folder`; `features` are a set's `paths`. Every method returns how many rows it did."""

    def __init__(self, features: Mapping[str, str], folder: str, k: int, metric: str, group_rows: int) -> None:
        self.features, self.folder, self.k, self.metric = FeatureSet.open(features), Path(folder), k, metric
        self.group_rows = group_rows
        self.work = self.folder / "work"

    @cached_property
    def centroids(self) -> np.ndarray:
        return open_npy(self.work / "centroids.npy")

    @cached_property
    def layout(self) -> Layout:
        """Known once every part is assigned."""
        bounds = [self._read("bounds", part.number) for part in self.features.parts]
        return Layout(np.stack(bounds), self.group_rows)

    def assign(self, number: int, nprobe: int) -> dict[str, Any]:
        rows = self.features.parts[number].rows
        probes = np.empty((rows, nprobe), dtype=np.int32)
        for start in range(0, rows, CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            block = self._vectors(self.features.block(number, start, start + CHUNK_ROWS))
            probes[here] = faiss.knn(block, self.centroids, nprobe)[1]
        order = np.argsort(probes[:, 0], kind="stable").astype(np.int32)
        bounds = np.searchsorted(probes[order, 0], np.arange(len(self.centroids) + 1))
        for kind, array in (("order", order), ("probes", probes[order]), ("bounds", bounds)):
            self._write(kind, number, array)
        return {"rows": rows}

    def sort(self, group: int, nprobe: int) -> dict[str, Any]:
        lists, (start, stop) = self.layout.lists_of(group), self.layout.rows_of(group)
        rows = np.empty((stop - start, self.features.dim), self.features.dtype)
        ids, probes = np.empty(stop - start, np.int64), np.empty((stop - start, nprobe), np.int32)
        for part in self.features.parts:
            here = slice(*self.layout.bounds[part.number, [lists.start, lists.stop]].tolist())
            at = self.layout.places(part.number, lists) - start
            own = self._read("order", part.number)[here].astype(np.int64)
            rows[at], ids[at] = self.features.block(part.number)[own], part.number << 32 | own
            probes[at] = self._read("probes", part.number)[here]
        for kind, array in (("list-rows", rows), ("list-ids", ids), ("list-probes", probes)):
            self._write(kind, group, array)
        return {"rows": stop - start}

    def search(self, group: int, broadcast: None) -> dict[str, Any]:
        raw, own_ids = self._read("list-rows", group), self._read("list-ids", group)
        x, candidates = self._vectors(raw), self._candidates(group)
        distances, ids = np.empty((len(x), self.k), np.float32), np.empty((len(x), self.k), np.int64)
        reference = SetReference(self.features)
        for start in range(0, len(x), CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            distances[here], ids[here] = rescore(
                x[here], candidates[here], own_ids[here], reference, self.k, self.metric
            )
        self._write("found-distances", group, distances)
        self._write("found-ids", group, ids)
        return {"rows": len(x)}

    def gather(self, number: int, broadcast: None) -> dict[str, Any]:
        part, layout = self.features.parts[number], self.layout
        order = self._read("order", number)
        distances, ids = np.empty((part.rows, self.k), np.float32), np.empty((part.rows, self.k), np.int64)
        for group in range(layout.num_groups):
            lists = layout.lists_of(group)
            own = order[layout.bounds[number, lists.start] : layout.bounds[number, lists.stop]]
            at = layout.places(number, lists) - layout.rows_of(group)[0]
            distances[own] = self._read("found-distances", group)[at]
            ids[own] = self._read("found-ids", group)[at]
        write_npy(self.folder / "distances" / part.file, distances)
        write_npy(self.folder / "ids" / part.file, ids)
        return {"rows": part.rows}

    def _candidates(self, group: int) -> np.ndarray:
        """Row ids (m, k + 1) of the nearest rows of each of a group's rows in the lists that it probes, itself too."""
        x, width = self._vectors(self._read("list-rows", group)), self.k + 1
        best = np.full((len(x), width), np.inf, np.float32)
        ids = np.full((len(x), width), -1, np.int64)
        lists = self._lists()
        for number, queries in _by_list(self._read("list-probes", group)):
            rows, row_ids = lists(number)
            if not len(rows):
                continue
            squared, at = faiss.knn(x[queries], rows, min(width, len(rows)))
            nearer = squared[:, 0] < best[queries, -1]
            queries, squared, at = queries[nearer], squared[nearer], at[nearer]
            both = np.concatenate([best[queries], squared], axis=1)
            kept = np.argsort(both, axis=1, kind="stable")[:, :width]
            best[queries] = np.take_along_axis(both, kept, 1)
            ids[queries] = np.take_along_axis(np.concatenate([ids[queries], row_ids[at]], axis=1), kept, 1)
        short = np.flatnonzero(ids[:, -1] < 0)  # the lists that they probe hold too few rows
        if len(short):
            nobody = np.full(len(short), -1)
            ids[short] = exact_knn(x[short], nobody, SetReference(self.features), width, self.metric)[1]
        return ids

    def _lists(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """A function that gives the rows of a list as the metric compares them, and their row ids."""
        layout = self.layout
        opened = lru_cache(OPEN_GROUPS)(lambda group: (self._read("list-rows", group), self._read("list-ids", group)))

        def of(number: int) -> tuple[np.ndarray, np.ndarray]:
            group = int(np.searchsorted(layout.groups, number, side="right")) - 1
            start = layout.rows_of(group)[0]
            here = slice(int(layout.list_start[number]) - start, int(layout.list_start[number + 1]) - start)
            rows, ids = opened(group)
            return self._vectors(rows[here]), ids[here]

        return of

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(prepare(rows, self.metric), dtype=np.float32)

    def _read(self, kind: str, number: int) -> np.ndarray:
        return open_npy(self.work / kind / f"{part_file('part', number)}.npy")

    def _write(self, kind: str, number: int, array: np.ndarray) -> None:
        write_npy(self.work / kind / f"{part_file('part', number)}.npy", array)


def _by_list(probes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """`(list, rows that probe it)` of probes (m, nprobe), each list once."""
    flat = probes.ravel()
    order = np.argsort(flat, kind="stable")
    lists, starts = np.unique(flat[order], return_index=True)
    yield from zip(lists.tolist(), np.split(order // probes.shape[1], starts[1:]), strict=True)
