"""One worker of the embedding job: spans of shards in, one feature part out."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sslscale.features.store import DTYPES, FeatureStore
from sslscale.models.load import EmbedderSpec
from sslscale.shards.dataset import open_shards
from sslscale.shards.decode import DecodeError, decode_image, label_of
from sslscale.shards.plan import Span
from sslscale.shards.stream import Failure, Sample, Ticket, draw_spans
from sslscale.views.image import to_float

_CHUNK = 32  # samples a decoding task: large enough to hide the cost of a task, small enough to keep threads busy


@dataclass(frozen=True)
class _Decoded:
    sample: Sample
    image: np.ndarray
    label: int | None


class EmbedWorker:
    """Holds the backbone; every part is computed in batches of one fixed shape, so it never depends on a neighbour."""

    def __init__(
        self,
        *,
        store: str,
        shards: str,
        cache: str,
        spec: EmbedderSpec,
        batch_size: int,
        dtype: str,
        normalize: bool,
        decode_threads: int,
        device: str,
    ) -> None:
        self.shards = open_shards(shards, cache=Path(cache))  # a limit is in the spans already
        self.spec, self.batch_size, self.decode_threads = spec, batch_size, decode_threads
        self.device = torch.device(device)
        self.backbone = spec.build().to(self.device)
        self.store = FeatureStore.create(
            store, dim=self.backbone.feature_dim, dtype=dtype, normalized=normalize, backbone=spec.sha256
        )

    def embed(self, item: tuple[int, list[Span]], broadcast: Any = None) -> dict[str, Any]:
        """Writes part `item[0]` from the spans `item[1]`; returns its record, with `failures` (key, reason)."""
        part, spans = item
        failures: list[dict[str, Any]] = []
        rows: list[np.ndarray] = []
        kept: list[_Decoded] = []
        with ThreadPoolExecutor(self.decode_threads) as pool:
            for batch in self._batches(self._decoded(spans, pool, failures)):
                features = self._forward([item.image for item in batch])
                finite = np.isfinite(features).all(axis=1)
                for decoded, ok in zip(batch, finite, strict=True):
                    if ok:
                        kept.append(decoded)
                    else:
                        failures.append({"key": decoded.sample.key, "reason": "the backbone gave a non-finite feature"})
                rows.append(features[finite])
        record = self._write(part, rows, kept)
        return {**record, "samples_in": sum(map(len, spans)), "failures": failures}

    def _decoded(
        self, spans: list[Span], pool: ThreadPoolExecutor, failures: list[dict[str, Any]]
    ) -> Iterator[_Decoded]:
        """Samples in plan order, read and decoded ahead of the backbone; what cannot be goes to `failures`."""
        tickets = draw_spans(self.shards, spans)
        ahead = self.batch_size // _CHUNK + 2 * self.decode_threads
        pending: deque[Future[list[_Decoded | Failure]]] = deque()
        while True:
            while len(pending) < ahead and (chunk := list(itertools.islice(tickets, _CHUNK))):
                pending.append(pool.submit(self._decode, chunk))
            if not pending:
                return
            for item in pending.popleft().result():
                if isinstance(item, Failure):
                    shard = self.shards.shards[item.shard].name
                    failures.append({"key": item.key, "shard": shard, "record": item.record, "reason": item.reason})
                else:
                    yield item

    def _decode(self, tickets: list[Ticket]) -> list[_Decoded | Failure]:
        decoded: list[_Decoded | Failure] = []
        for ticket in tickets:
            sample = ticket.read()
            try:
                if isinstance(sample, Sample):
                    image = decode_image(sample.data, self.spec.channels, self.spec.size)
                    decoded.append(_Decoded(sample, image, label_of(sample.data)))
                else:
                    decoded.append(sample)
            except DecodeError as error:
                decoded.append(ticket.failure(error.reason))
        return decoded

    def _batches(self, items: Iterator[_Decoded]) -> Iterator[list[_Decoded]]:
        batch: list[_Decoded] = []
        for item in items:
            batch.append(item)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(self, images: list[Any]) -> np.ndarray:
        """(n, D) features of n <= batch_size images; the last batch of a part is padded to the fixed shape."""
        stacked = np.zeros((self.batch_size, *images[0].shape), np.uint8)
        np.stack(images, out=stacked[: len(images)])
        features = self.backbone(to_float(torch.from_numpy(stacked).to(self.device))).float()
        if self.store.normalized:
            features = F.normalize(features, dim=1)
        return features[: len(images)].cpu().numpy().astype(DTYPES[self.store.dtype])

    def _write(self, part: int, rows: list[np.ndarray], kept: list[_Decoded]) -> dict[str, Any]:
        labels = [item.label for item in kept]
        return self.store.write_part(
            part,
            np.concatenate(rows) if rows else np.zeros((0, self.store.dim), DTYPES[self.store.dtype]),
            keys=[item.sample.key for item in kept],
            shards=[self.shards.shards[item.sample.shard].name for item in kept],
            offsets=[item.sample.record for item in kept],
            labels=labels if any(label is not None for label in labels) else None,
        )
