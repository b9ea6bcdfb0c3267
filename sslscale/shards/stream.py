"""Records of shards as samples: the plan's spans in order, or one endless shuffled stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import webdataset as wds

from sslscale.errors import UserError
from sslscale.shards.dataset import INDEX, ShardSet
from sslscale.shards.filtered import FilteredShard
from sslscale.shards.plan import Cursor, Span, block_permutation, plan_stream
from sslscale.shards.tar import SampleError, TarShard

_OPEN_SHARDS = 256


@dataclass(frozen=True)
class Sample:
    """`data` is a webdataset sample: extension -> bytes; `id` is the global sample id."""

    key: str
    shard: int
    record: int
    id: int
    epoch: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A record that gave no sample. `key` is `<shard name>#<record>` where the key itself is lost."""

    key: str
    shard: int
    record: int
    reason: str


@dataclass(frozen=True)
class Ticket:
    """One place of the plan, not read yet: cheap to draw in order, and read by any thread."""

    shards: ShardSet
    tar: TarShard | FilteredShard
    shard: int
    record: int
    epoch: int

    @property
    def key(self) -> str:
        known = self.record < len(self.tar)
        return self.tar.keys[self.record] if known else f"{self.shards.shards[self.shard].name}#{self.record}"

    def read(self) -> Sample | Failure:
        """The sample; a Failure where the record is damaged, refused, or promised by shards.json and not there."""
        if self.record >= len(self.tar):
            return self.failure(self.tar.damage or f"missing: {INDEX} promises it and the shard does not hold it")
        try:
            data = self.tar.read(self.record)
        except SampleError as error:
            return self.failure(error.reason)
        number = int(self.shards.offsets[self.shard]) + self.record
        return Sample(self.key, self.shard, self.record, number, self.epoch, data)

    def failure(self, reason: str) -> Failure:
        return Failure(self.key, self.shard, self.record, reason)


def read_spans(shards: ShardSet, spans: Sequence[Span]) -> Iterator[Sample | Failure]:
    """The records of the spans, once and in order: a webdataset pipeline with our own tar stage in it."""
    return iter(wds.DataPipeline(lambda: draw_spans(shards, spans), wds.map(Ticket.read)))


def spread_spans(shards: ShardSet, limit: int) -> list[Span]:
    """The spans of at most `limit` samples, spread evenly over the dataset."""
    count = min(limit, shards.num_samples)
    ids = np.arange(count) * shards.num_samples // max(1, count)
    numbers = np.searchsorted(shards.offsets + shards.counts, ids, side="right")
    records = ids - shards.offsets[numbers]
    return [Span(shard, record, record + 1) for shard, record in zip(numbers.tolist(), records.tolist(), strict=True)]


def draw_spans(shards: ShardSet, spans: Sequence[Span]) -> Iterator[Ticket]:
    """The records of the spans in order, not read yet: for readers that read and decode in threads."""
    for span, following in itertools.zip_longest(spans, itertools.islice(spans, 1, None)):
        tar = shards.open(span.shard)
        if following is not None:
            shards.read_ahead(following.shard)
        for record in range(span.start, span.stop):
            yield Ticket(shards, tar, span.shard, record, epoch=0)


class SampleReader:
    """Records by global id, in any order. The shards used last stay open."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._open = functools.lru_cache(_OPEN_SHARDS)(shards.open)

    def draw(self, ids: np.ndarray) -> list[Ticket]:
        """The records of ids (n,), not read yet."""
        located = zip(*(place.tolist() for place in self.shards.locate(ids)), strict=True)
        return [Ticket(self.shards, self._open(shard), shard, record, epoch=0) for shard, record in located]


class StreamReader:
    """Stream `stream` of `num_streams`, endless: an epoch rolls into the next. Starts at `cursor`.

    `cursor` is the place of the next record; a reader made with it goes on exactly there. Raises UserError where
    there are fewer samples than streams.
    """

    def __init__(
        self, shards: ShardSet, stream: int, num_streams: int, seed: int, shuffle_block: int, cursor: Cursor
    ) -> None:
        if shards.num_samples < num_streams:
            raise UserError(
                "there are fewer samples than streams",
                got=f"{shards.num_samples} samples in {shards.url}, {num_streams} streams",
                fix="lower pretrain.num_streams",
            )
        self.shards, self.stream, self.num_streams = shards, stream, num_streams
        self.seed, self.shuffle_block = seed, shuffle_block
        self._epoch, self._position = cursor.epoch, cursor.position
        self._plan_epoch()
        self._plan_block()

    def __len__(self) -> int:
        """Records of one epoch, the same in every epoch."""
        return int(self._ends[-1])

    @property
    def cursor(self) -> Cursor:
        return Cursor(self._epoch, self._position)

    def next(self) -> Sample | Failure:
        """The next record, read."""
        return self.draw().read()

    def draw(self) -> Ticket:
        """The next record, not read yet; the cursor moves past it."""
        shard, record = self._block[self._position % self.shuffle_block]
        ticket = Ticket(self.shards, self._tars[shard], shard, record, self._epoch)
        self._position += 1
        if self._position == len(self):
            self._epoch, self._position = self._epoch + 1, 0
            self._plan_epoch()
        if self._position % self.shuffle_block == 0:
            self._plan_block()
        return ticket

    def _plan_epoch(self) -> None:
        spans = plan_stream(self.shards.counts, self.seed, self._epoch, self.stream, self.num_streams)
        self._ends = np.cumsum([len(span) for span in spans])
        self._shards, self._stops = np.array([(span.shard, span.stop) for span in spans]).T

    def _plan_block(self) -> None:
        """The (shard, record) of each place of the cursor's block, and its shards, open until the next block is."""
        block = self._position // self.shuffle_block
        start = block * self.shuffle_block
        stop = min(start + self.shuffle_block, len(self))
        places = start + block_permutation(stop - start, self.seed, self._epoch, self.stream, block)
        spans = np.searchsorted(self._ends, places, side="right")
        shards, records = self._shards[spans], self._stops[spans] - self._ends[spans] + places
        self._block = list(zip(shards.tolist(), records.tolist(), strict=True))
        needed = np.unique(shards).tolist()
        for shard in needed:
            self.shards.read_ahead(shard)
        self._tars = {shard: self.shards.open(shard) for shard in needed}
        ahead = np.searchsorted(self._ends, [stop, min(stop + self.shuffle_block, len(self)) - 1], side="right")
        for shard in np.unique(self._shards[ahead[0] : ahead[1] + 1]).tolist():  # of the next block, in this epoch
            self.shards.read_ahead(shard)
