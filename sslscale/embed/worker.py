"""One worker of the embedding job: spans of shards in, one feature part out."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from sslscale.features.store import DTYPES, FeatureStore
from sslscale.models.base import Encoder
from sslscale.models.load import EmbedderSpec
from sslscale.objectives.export import load_objective
from sslscale.runtime.allocator import keep_freed_memory
from sslscale.shards.dataset import ShardSet
from sslscale.shards.decode import DecodeError, known_label
from sslscale.shards.plan import Span
from sslscale.shards.stream import Failure, Sample, Ticket, draw_spans
from sslscale.views.base import as_input

_LARGEST_TASK = 32  # samples decoded together: enough to hide the cost of a task

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Row(NamedTuple):
    """What the part's table says of a sample."""

    key: str
    shard: int
    record: int
    label: int | None
    bad_label: bool  # whether it has one that is no integer
    sha256: bytes


class EmbedWorker:
    """Holds the backbone; every part is computed in batches of one fixed shape, so it never depends on a neighbour.

    `objective` is an exported objective, whose further outputs become columns of the part's table.
    `decode_threads` read and decode ahead of the backbone; with 0 it waits for them. `autocast` is "none" or one of
    AUTOCAST.
    """

    def __init__(
        self,
        *,
        store: str,
        shards: ShardSet,
        spec: EmbedderSpec,
        objective: str | None = None,
        batch_size: int,
        dtype: str,
        normalize: bool,
        decode_threads: int,
        device: str,
        autocast: str = "none",
        compile: bool = False,
    ) -> None:
        self.shards, self.spec, self.batch_size, self.decode_threads = shards, spec, batch_size, decode_threads
        self.device, self.autocast = torch.device(device), AUTOCAST.get(autocast)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.backbone = spec.build().to(self.device)
        self.reader = spec.reader(self.backbone)
        self.objective = None
        if objective is not None:
            shared = self.backbone if spec.as_trained else None  # one copy, and the one that is compiled
            assert shared is None or isinstance(shared, Encoder)  # objectives lie beside an exported backbone
            self.objective = load_objective(Path(objective), shared).to(self.device)
        if compile:
            self.backbone.compile()
        self.store = FeatureStore.create(
            store, dim=self.backbone.feature_dim, dtype=dtype, normalized=normalize, backbone=spec.sha256
        )

    def embed(self, item: tuple[int, list[Span]], broadcast: None = None) -> dict[str, Any]:
        """Writes part `item[0]` from the spans `item[1]`; returns its record, with `failures` (key, reason).

        `bad_labels` counts the rows that have no label because theirs is no integer.
        """
        part, spans = item
        failures: list[dict[str, Any]] = []
        features, further, rows = self._features(spans, failures)
        record = self._write(part, features, further, rows)
        sizes = zip(("bytes", "table_bytes"), self.store.part_files(part), strict=True)
        record |= {name: file.stat().st_size for name, file in sizes}
        bad_labels = sum(row.bad_label for row in rows)
        return {**record, "samples_in": sum(map(len, spans)), "bad_labels": bad_labels, "failures": failures}

    def sample(self, spans: list[Span], broadcast: None = None) -> np.ndarray:
        """The features of the spans' samples, (n, D), those that fail left out; nothing is written."""
        return self._features(spans, [])[0]

    def _features(
        self, spans: list[Span], failures: list[dict[str, Any]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], list[_Row]]:
        """Features (n, D), further outputs (n, ...) and rows of the samples that gave them, in the plan's order."""
        made = [np.zeros((0, self.backbone.feature_dim), DTYPES[self.store.dtype])]
        further: dict[str, list[np.ndarray]] = {}
        kept: list[_Row] = []
        for batch in _batches(self._decoded(spans, failures), self.batch_size):
            outputs = self._forward([array for array, _ in batch])
            finite = np.all([np.isfinite(v).reshape(len(batch), -1).all(axis=1) for v in outputs.values()], axis=0)
            made.append(outputs.pop("features")[finite])
            for name, values in outputs.items():
                further.setdefault(name, []).append(values[finite])
            kept += [row for (_, row), ok in zip(batch, finite, strict=True) if ok]
            failures += [
                {"key": row.key, "reason": "the backbone gave a non-finite feature"}
                for (_, row), ok in zip(batch, finite, strict=True)
                if not ok
            ]
        return np.concatenate(made), {name: np.concatenate(values) for name, values in further.items()}, kept

    def _decoded(self, spans: list[Span], failures: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, _Row]]:
        """Arrays and rows of the samples in the order of the plan; what cannot be used goes to `failures`."""
        tickets = draw_spans(self.shards, spans)
        threads = self.decode_threads
        size = min(_LARGEST_TASK, max(1, self.batch_size // (4 * max(1, threads))))
        tasks = iter(lambda: list(itertools.islice(tickets, size)), [])
        with ThreadPoolExecutor(threads) if threads else contextlib.nullcontext() as pool:
            ahead = self.batch_size // size + 2 * threads
            results = _ahead(pool, self._decode, tasks, ahead) if pool else map(self._decode, tasks)
            for item in itertools.chain.from_iterable(results):
                if isinstance(item, Failure):
                    shard = self.shards.shards[item.shard].name
                    failures.append({"key": item.key, "shard": shard, "record": item.record, "reason": item.reason})
                else:
                    yield item

    def _decode(self, tickets: list[Ticket]) -> list[tuple[np.ndarray, _Row] | Failure]:
        return [self._decode_one(ticket) for ticket in tickets]

    def _decode_one(self, ticket: Ticket) -> tuple[np.ndarray, _Row] | Failure:
        sample = ticket.read()
        if not isinstance(sample, Sample):
            return sample
        try:
            array = self.reader.read(sample.data)
        except DecodeError as error:
            return ticket.failure(error.reason)
        label = known_label(sample.data)
        is_bad = label is None and "cls" in sample.data
        sha256 = self.reader.content_hash(sample.data)
        return array, _Row(sample.key, sample.shard, sample.record, label, is_bad, sha256)

    @torch.inference_mode()
    def _forward(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """`features` (n, D) of n <= batch_size samples in the store's dtype, and the objective's further outputs, fp32.

        The last batch of a part is padded to the fixed shape.
        """
        pinned = self.device.type == "cuda"
        batch = self.reader.collate(arrays, self.batch_size, pinned).to(self.device, non_blocking=pinned)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            x = as_input(batch)
            outputs = self.objective.outputs(x) if self.objective is not None else {}
            if not (outputs and self.spec.as_trained):
                outputs["features"] = self.backbone(x)
        if self.store.normalized:
            outputs["features"] = F.normalize(outputs["features"].float(), dim=1)
        found = {name: values[: len(arrays)].float().cpu().numpy() for name, values in outputs.items()}
        return {**found, "features": found["features"].astype(DTYPES[self.store.dtype])}

    def _write(
        self, part: int, features: np.ndarray, further: dict[str, np.ndarray], rows: list[_Row]
    ) -> dict[str, Any]:
        labels = [row.label for row in rows]
        return self.store.write_part(
            part,
            features,
            keys=[row.key for row in rows],
            shards=[self.shards.shards[row.shard].name for row in rows],
            offsets=[row.record for row in rows],
            labels=labels if any(label is not None for label in labels) else None,
            metadata={"sha256": pa.array([row.sha256 for row in rows], pa.binary(32)), **further},
        )


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    source = iter(items)
    return iter(lambda: list(itertools.islice(source, size)), [])


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item], depth: int
) -> Iterator[Result]:
    """`map` over the threads of a pool, in order, at most `depth` items ahead of who takes the results."""
    pending: deque[Future[Result]] = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
    while pending:
        result = pending.popleft().result()
        pending.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
        yield result
