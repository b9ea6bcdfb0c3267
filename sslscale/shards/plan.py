"""Which sample is read when, and by whom: pure functions of the shards' counts, the seed and the number of streams.

A run has `num_streams` streams, whatever the world size. Within an epoch the shards are permuted, their samples laid
end to end, and the line cut into streams; within a stream, samples are shuffled in blocks. Everything random comes
from numpy's SeedSequence and Philox's raw words, which are the same on every platform and numpy version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Counts = Sequence[int] | np.ndarray

# The first word of every spawn key, so that no two uses of the same (seed, epoch, ...) share random numbers.
_SHARDS, _BLOCK = 0, 1


@dataclass(frozen=True)
class Span:
    """The records [start, stop) of one shard."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cursor:
    """Where a stream is: `position` records of its epoch have been read."""

    epoch: int = 0
    position: int = 0


def plan_stream(counts: Counts, seed: int, epoch: int, stream: int, num_streams: int) -> list[Span]:
    """The spans that a stream reads in this epoch, in order.

    Every sample is in exactly one stream, and streams differ by at most one sample. A stream has the same length in
    every epoch.
    """
    order = _permutation(len(counts), seed, _SHARDS, epoch)
    ends = np.cumsum(np.asarray(counts, dtype=np.int64)[order])
    total = int(ends[-1]) if len(ends) else 0
    return _cut(order, ends, total * stream // num_streams, total * (stream + 1) // num_streams)


def block_permutation(length: int, seed: int, epoch: int, stream: int, block: int) -> np.ndarray:
    """The order in which a block of `length` samples of a stream is read: int64 (length,)."""
    return _permutation(length, seed, _BLOCK, epoch, stream, block)


def plan_parts(counts: Counts, part_rows: int) -> list[list[Span]]:
    """The spans of each embedding part: `part_rows` samples each, in the order of the shards; the last may be shorter.

    Shards that are appended later change the last part at most.
    """
    order = np.arange(len(counts))
    ends = np.cumsum(np.asarray(counts, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    return [_cut(order, ends, start, min(start + part_rows, total)) for start in range(0, total, part_rows)]


def _permutation(length: int, seed: int, *key: int) -> np.ndarray:
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(length)
    return np.argsort(bits, kind="stable")  # Generator.permutation may change between numpy versions; raw words do not


def _cut(order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[Span]:
    """The spans of [start, stop) on the line on which shard `order[i]` ends at `ends[i]`."""
    spans = []
    first = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin = int(ends[first - 1]) if first else 0
        end = min(int(ends[first]), stop)
        if end > start:  # an empty shard takes no place on the line
            spans.append(Span(int(order[first]), start - begin, end - begin))
        start, first = end, first + 1
    return spans
