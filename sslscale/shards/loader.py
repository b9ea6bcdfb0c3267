"""Batches of a rank's streams, decoded ahead of the training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sslscale.shards.dataset import ShardSet
from sslscale.shards.plan import Cursor
from sslscale.shards.stream import Failure


@dataclass(frozen=True)
class RawBatch:
    """One step's samples of one rank, in stream order."""

    images: torch.Tensor  # uint8 (b, C, H, W)
    ids: torch.Tensor  # int64 (b,)
    epochs: torch.Tensor  # int64 (b,)
    cursors: dict[int, Cursor]  # of this rank's streams, after the batch
    failures: list[Failure]


class TrainLoader:
    """Iterates `RawBatch`es for ever; use as a context manager, or call `close()`."""

    wait_seconds: float

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
        decode: Callable[[dict[str, Any]], np.ndarray],
        decode_threads: int = 1,
        prefetch: int = 2,
    ) -> None: ...

    def __iter__(self) -> Iterator[RawBatch]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
