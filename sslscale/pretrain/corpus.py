"""Passes over the whole training set between steps, for `Objective.prepare`: the same answers at any number of ranks.

Samples are taken in chunks of one size, in the order of their ids; rank r computes chunks r, r + W, r + 2W ... What a
pass gives is held by every rank: N rows. The decoded samples are kept for the next pass while they fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sslscale.errors import StageError, UserError
from sslscale.models.collectives import gather_rows, rank, world_size
from sslscale.runtime.base import compute_threads
from sslscale.shards.dataset import ShardSet
from sslscale.shards.readers import Reader
from sslscale.shards.stream import Failure, SampleReader, Ticket
from sslscale.shards.tar import SampleError
from sslscale.views.base import as_input
from sslscale.views.keyed import KeyedRandom

_CHUNK = 256  # samples of one pass of the backbone
_SETTLING = 40  # chunks, of which the first weighs 0.9^40 at BatchNorm's usual momentum
_KEPT_BYTES = 2**30  # decoded samples that a rank keeps


@dataclass(frozen=True)
class CorpusTools:
    """What later stages compute features with, handed in since imports go one way. Functions that can be pickled."""

    neighbours: Callable[[np.ndarray, slice, int], np.ndarray]
    """(features (n, D), which rows ask, k) -> int64 (rows, k): places of each row's k nearest others by cosine."""
    centroids: Callable[[np.ndarray, int, int, int], np.ndarray]
    """(features (n, D), K, seed, threads) -> fp32 (K, D) by k-means."""


class TrainingCorpus:
    """The `objectives.base.Corpus` of a training run; `module` is put into evaluation mode for a pass.

    `reader` makes inputs of samples; `feed` tells a watchdog that the work goes on.
    """

    def __init__(
        self,
        shards: ShardSet,
        module: torch.nn.Module,
        tools: CorpusTools,
        *,
        reader: Reader,
        decode_threads: int,
        device: torch.device,
        threads: int,
        seed: int,
        feed: Callable[[], None],
    ) -> None:
        self.num_samples = shards.num_samples
        self._chunks = -(-self.num_samples // _CHUNK)
        self._by_id, self._module, self._tools = SampleReader(shards), module, tools
        self._reader, self._decode_threads = reader, decode_threads
        self._device, self._threads, self._seed, self._feed = device, threads, seed, feed
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._ids: Tensor | None = None

    @torch.no_grad()
    def settle(self, backbone: torch.nn.Module) -> None:
        """Gives the weights the BatchNorm statistics that passes in evaluation mode go by: those of the samples.

        Every rank takes the same samples, so that the statistics do not depend on the number of ranks. Neither do they
        depend on those before: doing it again changes nothing.
        """
        if not backbone.training:  # a frozen one keeps its own
            return
        backbone.eval()  # nothing is dropped meanwhile
        for module in backbone.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
                module.train()
        with _alone(backbone):
            for turn in range(_SETTLING):
                self._feed()
                inputs, read = self._load(turn % self._chunks)
                if read.sum() > 1 or self._chunks == 1:  # a single sample has no variance
                    backbone(as_input(inputs[read].to(self._device)))
        backbone.train()

    @torch.no_grad()
    def map(self, function: Callable[[Tensor, KeyedRandom], Tensor]) -> Tensor:
        training = self._module.training
        self._module.eval()
        values, readable = [], []
        for turn in range(-(-self._chunks // world_size())):
            self._feed()
            chunk = (
                turn * world_size() + rank()
            ) % self._chunks  # the last turn wraps: all ranks compute equally often
            inputs, read = self._load(chunk)
            ids = torch.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK, device=self._device)
            random = KeyedRandom.of(self._seed, torch.zeros_like(ids), ids).fold("corpus")
            values.append(function(as_input(inputs.to(self._device)), random))
            readable.append(read.to(self._device))
        self._module.train(training)
        everyone = self._in_order(torch.stack(readable))
        self._ids = everyone.nonzero().flatten()
        return self._in_order(torch.stack(values))[self._ids]

    def _in_order(self, chunks: Tensor) -> Tensor:
        """(turns, chunk, ...) of this rank -> (N, ...) of all ranks, by id."""
        everyone = gather_rows(chunks[None].contiguous())  # (W, turns, chunk, ...)
        return everyone.transpose(0, 1).flatten(0, 2)[: self.num_samples]

    def _load(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Inputs (_CHUNK, ...) and which of them could be read, bool (_CHUNK,)."""
        if chunk in self._kept:
            return self._kept[chunk]
        ids = np.arange(chunk * _CHUNK, min((chunk + 1) * _CHUNK, self.num_samples))
        with ThreadPoolExecutor(self._decode_threads) as pool:
            arrays = list(pool.map(self._read, self._by_id.draw(ids)))
        read = torch.zeros(_CHUNK, dtype=torch.bool)
        read[: len(ids)] = torch.tensor([array is not None for array in arrays])
        instead = next((array for array in arrays if array is not None), None)
        if instead is None:
            instead = self._first_readable()
        arrays += [None] * (_CHUNK - len(ids))
        inputs = self._reader.collate([instead if array is None else array for array in arrays])
        found = inputs, read
        if (len(self._kept) + 1) * inputs.nbytes <= _KEPT_BYTES:
            self._kept[chunk] = found
        return found

    def _first_readable(self) -> np.ndarray:
        found = (self._read(self._by_id.draw(np.array([id]))[0]) for id in range(self.num_samples))
        first = next((array for array in found if array is not None), None)
        if first is None:
            raise StageError("no sample of the training set can be read", got=f"{self.num_samples} samples")
        return first

    def _read(self, ticket: Ticket) -> np.ndarray | None:
        sample = ticket.read()
        if isinstance(sample, Failure):
            return None  # counted where it is trained on
        try:
            return self._reader.read(sample.data)
        except SampleError:
            return None

    def by_id(self, values: Tensor) -> Tensor:
        assert self._ids is not None, "`map` comes first: it finds what can be read"
        table = values.new_zeros((self.num_samples, *values.shape[1:]))
        table[self._ids] = values
        return table

    def neighbours(self, features: Tensor, k: int) -> Tensor:
        assert self._ids is not None and len(features) == len(self._ids)
        if k >= len(features):
            raise UserError("more neighbours than other samples", got=f"{k} of {len(features)} samples")
        share = -(-len(features) // world_size())
        start = min(rank() * share, len(features) - 1)
        mine = slice(start, min(start + share, len(features)))
        self._feed()
        with compute_threads(self._threads):
            found = self._tools.neighbours(features.float().cpu().numpy(), mine, k)
        padded = torch.from_numpy(np.resize(found, (share, k))).to(self._device)
        return self._ids[gather_rows(padded)[: len(features)]]

    def centroids(self, features: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
        self._feed()
        rows = features.float().cpu().numpy()
        found = features.new_empty(num_clusters, features.shape[1], dtype=torch.float32)
        if rank() == 0 or num_clusters > len(rows):  # an error that every rank raises
            with compute_threads(self._threads):
                found.copy_(
                    torch.from_numpy(self._tools.centroids(rows, num_clusters, self._seed + seed, self._threads))
                )
        if world_size() > 1:
            dist.broadcast(found, src=0)
        return found


@contextlib.contextmanager
def _alone(module: torch.nn.Module) -> Iterator[None]:
    """BatchNorm counts each rank's samples by themselves."""
    gathered = [child for child in module.modules() if hasattr(child, "alone")]
    for child in gathered:
        child.alone = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for child in gathered:
            child.alone = False  # type: ignore[assignment]
