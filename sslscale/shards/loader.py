"""Batches of a rank's streams, read and decoded ahead of the training step."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from sslscale.errors import StageError, UserError
from sslscale.shards.dataset import ShardSet
from sslscale.shards.plan import Cursor
from sslscale.shards.readers import Reader
from sslscale.shards.stream import Failure, SampleReader, StreamReader, Ticket
from sslscale.shards.tar import SampleError


@dataclass(frozen=True)
class RawBatch:
    """One step's samples of one rank: stream after stream, in the streams' order."""

    inputs: torch.Tensor  # (b, ...), as the reader makes them
    ids: torch.Tensor  # int64 (b,)
    epochs: torch.Tensor  # int64 (b,)
    keys: list[str]  # b of them
    cursors: dict[int, Cursor]  # of this rank's streams, after the batch
    failures: list[Failure]
    partners: torch.Tensor | None = None  # as `inputs`, of the sample that was named beside each


@dataclass(frozen=True)
class _Row:
    array: np.ndarray
    id: int
    epoch: int
    key: str


class TrainLoader:
    """Iterates this rank's `RawBatch`es, endlessly. A context manager; `close()` ends its threads.

    A rank reads streams rank, rank + world_size, ...; every step takes `global_batch / num_streams` samples of every
    stream, and a record that fails is replaced by its stream's next. So a step's samples over all ranks depend on
    neither the world size nor the threads. `cursors` holds one for every stream of the run (None: from the start).
    `reader` reads and decodes in `decode_threads` threads.
    `partners` maps the ids and epochs (b,) of a batch to the ids (b,) of the samples to be read beside them, or None.
    `wait_seconds` is how long the consumer has waited. Raises UserError for sizes that do not divide.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        rank: int,
        world_size: int,
        num_streams: int,
        global_batch: int,
        seed: int,
        shuffle_block: int,
        cursors: list[Cursor] | None,
        reader: Reader,
        decode_threads: int = 1,
        prefetch: int = 2,
        partners: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None] = lambda ids, epochs: None,
    ) -> None:
        check_divides("num_streams", num_streams, "global_batch", global_batch)
        check_divides("world_size", world_size, "num_streams", num_streams)
        cursors = cursors or [Cursor()] * num_streams
        self.readers = {
            stream: StreamReader(shards, stream, num_streams, seed, shuffle_block, cursors[stream])
            for stream in range(rank, num_streams, world_size)
        }
        self.per_stream = global_batch // num_streams
        self.reader, self.decode_threads, self.prefetch = reader, decode_threads, prefetch
        self.partners = partners
        self._by_id = SampleReader(shards)
        self.wait_seconds = 0.0
        self._failed_in_a_row = dict.fromkeys(self.readers, 0)
        self._assembler = ThreadPoolExecutor(1, "sslscale-batches")  # one thread: batches are made in order
        self._decoders = ThreadPoolExecutor(decode_threads, "sslscale-decode")
        self._ahead: deque[Future[RawBatch]] = deque()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._assembler.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown()

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            while len(self._ahead) <= self.prefetch:
                self._ahead.append(self._assembler.submit(self._assemble))
            start = time.perf_counter()
            batch = self._ahead.popleft().result()
            self.wait_seconds += time.perf_counter() - start
            yield batch

    def _assemble(self) -> RawBatch:
        rows: dict[int, list[_Row]] = {stream: [] for stream in self.readers}
        failures: list[Failure] = []
        while missing := {stream: n for stream, got in rows.items() if (n := self.per_stream - len(got))}:
            streams = [stream for stream, count in missing.items() for _ in range(count)]
            results = self._read([self.readers[stream].draw() for stream in streams])
            for stream, result in zip(streams, results, strict=True):
                if isinstance(result, Failure):
                    failures.append(result)
                    self._count_failure(stream, result)
                else:
                    rows[stream].append(result)
                    self._failed_in_a_row[stream] = 0
        ordered = list(itertools.chain.from_iterable(rows.values()))
        ids, epochs = torch.tensor([row.id for row in ordered]), torch.tensor([row.epoch for row in ordered])
        return RawBatch(
            inputs=self.reader.collate([row.array for row in ordered]),
            ids=ids,
            epochs=epochs,
            keys=[row.key for row in ordered],
            cursors={stream: reader.cursor for stream, reader in self.readers.items()},
            failures=failures,
            partners=self._read_partners(self.partners(ids, epochs)),
        )

    def _read_partners(self, ids: torch.Tensor | None) -> torch.Tensor | None:
        if ids is None:
            return None
        arrays = []
        for result in self._read(self._by_id.draw(ids.numpy())):
            if isinstance(result, Failure):
                raise StageError("a sample could be read before and cannot now", got=f"{result.key}: {result.reason}")
            arrays.append(result.array)
        return self.reader.collate(arrays)

    def _read(self, tickets: list[Ticket]) -> Iterator[_Row | Failure]:
        """Reads and decodes, in the order of the tickets. Several a task: a task costs as much as a small image."""
        size = -(-len(tickets) // (4 * self.decode_threads))
        chunks = [tickets[start : start + size] for start in range(0, len(tickets), size)]
        return itertools.chain.from_iterable(self._decoders.map(self._read_chunk, chunks))

    def _read_chunk(self, tickets: list[Ticket]) -> list[_Row | Failure]:
        return [self._read_one(ticket) for ticket in tickets]

    def _read_one(self, ticket: Ticket) -> _Row | Failure:
        sample = ticket.read()
        if isinstance(sample, Failure):
            return sample
        try:
            return _Row(self.reader.read(sample.data), sample.id, sample.epoch, sample.key)
        except SampleError as error:
            return ticket.failure(error.reason)

    def _count_failure(self, stream: int, failure: Failure) -> None:
        self._failed_in_a_row[stream] += 1
        if self._failed_in_a_row[stream] >= len(self.readers[stream]):
            raise StageError(
                f"no record of stream {stream} can be read: a whole epoch failed",
                got=f"{len(self.readers[stream])} records; the last one, {failure.key}: {failure.reason}",
                fix="look at the shards: sslscale pack makes new ones",
            )


def check_divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises UserError where `small` does not divide `large`."""
    if small < 1 or large % small:
        raise UserError(
            f"{small_name} must divide {large_name}",
            got=f"{small_name}={small}, {large_name}={large}",
            allowed=", ".join(str(n) for n in range(1, min(large, 4096) + 1) if large % n == 0),
        )
