"""How hard to look where only some of an index's vectors count: those that a filter and the deletions leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import faiss
import numpy as np

from sslscale.index.factory import (
    Effort,
    inverted_lists,
    nearest_lists,
    rows_of_list,
    selector_of,
    takes_selector,
)

GRAPH_TOUCHES = 16  # rows that a graph compares for each place of its candidate list, about
SCAN_SHARE = 0.1  # up to this share of the rows, fetching them costs less than asking a selector about every row
LISTS_AT_ONCE = 2**22  # that are named for queries, all together
NEARLY_ALL = 0.99  # of the rows: then the effort stays what it is


@dataclass(frozen=True)
class Look:
    """Some queries, the effort that they need, and how many neighbours to ask for."""

    queries: np.ndarray
    effort: Effort
    k: int


class Kept:
    """The vectors of an index for which `mask` (N,) is true."""

    def __init__(self, index: faiss.Index, mask: np.ndarray) -> None:
        self.index, self.mask = index, mask
        self.count = int(mask.sum())

    @cached_property
    def selector(self) -> faiss.IDSelector:
        return selector_of(self.mask)

    @cached_property
    def _lists(self) -> Any:
        return inverted_lists(self.index)

    @cached_property
    def in_lists(self) -> np.ndarray:
        """(2, lists + 1): how many vectors each inverted list holds, and how many of these; none in the last, -1."""
        lists = self._lists
        held = np.zeros((2, lists.nlist + 1), dtype=np.int64)
        for number in range(lists.nlist):
            held[0, number] = lists.invlists.list_size(number)
            if held[0, number]:
                held[1, number] = np.count_nonzero(self.mask[rows_of_list(lists, number)])
        return held

    def looks(self, x: np.ndarray, effort: Effort, k: int) -> Iterator[Look]:
        """The searches of x (n, D) that see as many of these vectors as `effort` sees of all.

        Queries in none of them are cheaper to compare with each of these vectors. What is kept may lie far from a
        query (its label is another one): so lists are counted, and a graph is asked for as many as it looks through.
        """
        if not takes_selector(self.index):
            return
        everyone, share = np.arange(len(x)), self.count / self.index.ntotal
        if effort.nprobe is not None:
            if share >= NEARLY_ALL:
                yield Look(everyone, effort, k)
            else:
                yield from self._until_enough(x, effort, k)
        elif effort.ef_search is not None:
            wide = replace(effort, ef_search=int(np.ceil(effort.ef_search / share)))
            if share >= NEARLY_ALL or self.count > GRAPH_TOUCHES * wide.ef_search:  # type: ignore[operator]
                yield Look(everyone, wide, min(max(k, effort.ef_search), self.count))
        elif share > SCAN_SHARE:
            yield Look(everyone, effort, k)

    def _until_enough(self, x: np.ndarray, effort: Effort, k: int) -> Iterator[Look]:
        nlist = self._lists.nlist
        most = (nlist * self.count - 1) // self.index.ntotal  # lists that hold fewer vectors than are kept at all
        step = max(1, LISTS_AT_ONCE // max(most, effort.nprobe or 1))
        for start in range(0, len(x), step):
            yield from self._of_some(x, np.arange(start, min(start + step, len(x))), effort, k, most)

    def _of_some(self, x: np.ndarray, left: np.ndarray, effort: Effort, k: int, most: int) -> Iterator[Look]:
        """Of the queries `left`; those that would look at more than `most` lists are in none."""
        nprobe = effort.nprobe or 1
        vectors, kept = self.in_lists
        wanted = np.zeros(len(x), np.int64)
        wanted[left] = vectors[nearest_lists(self.index, x[left], nprobe)].sum(axis=1)
        while len(left) and nprobe <= most:
            enough = kept[nearest_lists(self.index, x[left], nprobe)].sum(axis=1) >= wanted[left]
            if enough.any():
                yield Look(left[enough], replace(effort, nprobe=nprobe), k)
            left = left[~enough]
            nprobe = min(2 * nprobe, most) if nprobe < most else most + 1
