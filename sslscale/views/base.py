"""What an objective asks of the loader, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sslscale.views.image import to_float
from sslscale.views.keyed import KeyedRandom


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch: named tensors, first axis B. There is no label in it.

    `random` draws for the same samples, for what an objective does at random itself (masks, dropout). `ids` is int64
    (B,), each sample's place in the corpus, for what an objective keeps of every sample. `partner` holds the views of
    the sample that `Objective.partners` named beside each of these, where it names any.
    """

    views: dict[str, Tensor]
    random: KeyedRandom
    ids: Tensor
    partner: Batch | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def __len__(self) -> int:
        return len(self.random)


class ViewSpec(Protocol):
    """Turns inputs into an objective's views, and into the targets of its pretext task."""

    def __call__(self, inputs: Tensor, random: KeyedRandom, /) -> dict[str, Tensor]:
        """inputs: what the objective takes, (B, ...) on the training device: images and clips are float in [0, 1]."""
        ...


def as_input(batch: Tensor) -> Tensor:
    """What models and views take of a batch as it was read: bytes become float32 in [0, 1], tokens stay."""
    return to_float(batch) if batch.dtype == torch.uint8 else batch
