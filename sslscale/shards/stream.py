"""Records of shards as samples, one stream at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sslscale.shards.dataset import ShardSet
from sslscale.shards.plan import Cursor, Span


@dataclass(frozen=True)
class Sample:
    """`data` maps extensions to bytes, like webdataset's samples; `id` is the global sample id."""

    key: str
    shard: int
    record: int
    id: int
    epoch: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A record that gave no sample. `key` is "<shard name>#<record>" where the key itself is lost."""

    key: str
    shard: int
    record: int
    reason: str


def read_spans(shards: ShardSet, spans: Iterable[Span]) -> Iterator[Sample | Failure]:
    """The records of the spans in order, once (epoch 0)."""
    raise NotImplementedError


class StreamReader:
    """One endless stream of the plan; `cursor` is what the next record starts from."""

    def __init__(
        self, shards: ShardSet, stream: int, num_streams: int, seed: int, shuffle_block: int, cursor: Cursor
    ) -> None: ...

    cursor: Cursor

    def next(self) -> Sample | Failure:
        raise NotImplementedError
