"""What an objective asks of the loader, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sslscale.views.keyed import KeyedRandom


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch: named tensors, first axis B. There is no label in it.

    `random` draws for the same samples, for what an objective does at random itself (masks, dropout).
    """

    views: dict[str, Tensor]
    random: KeyedRandom

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def __len__(self) -> int:
        return len(self.random)


class ViewSpec(Protocol):
    """Turns loaded images into an objective's views, and into the targets of its pretext task."""

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        """images: float (B, C, H, W) in [0, 1], on the training device."""
        ...
