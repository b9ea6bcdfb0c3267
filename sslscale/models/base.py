"""What can embed, and what can be trained: the interfaces that every modality's models have in common.

Whatever they take is one tensor whose first axis is the batch, as the model's own reader makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.shards.readers import ImageReader, Reader
from sslscale.views.keyed import KeyedRandom


class Embedder(nn.Module):
    """Inputs (B, ...) -> features (B, `feature_dim`).

    Contiguous images (B, C, S, S) in [0, 1], unless it has another reader.
    """

    feature_dim: int

    def reader(self, channels: int | None, size: int | None) -> Reader:
        """How samples become inputs: `channels` and `size` of images; of a text, `size` is the most tokens."""
        assert channels is not None
        return ImageReader(channels, size)


class Encoder(Embedder):
    """An embedder that can be trained and exported: what an objective owns as its backbone.

    `model` is the library's own model, and what is exported; around it lies what the library does not know of
    (normalisation, pooling). It is made from its config and the files that `fit` left, and nothing else.
    """

    OFFERS: ClassVar[tuple[str, ...]]
    """What an objective can be given of the inputs: first the inputs themselves, then what `offer` makes of them."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """What `fit` writes and an export holds beside the weights."""
    config: Any
    model: nn.Module
    frozen = False

    @classmethod
    def fit(cls, config: Any, samples: Callable[[int], Iterable[dict[str, Any]]], folder: Path) -> None:
        """Writes FILES into `folder`, from the corpus, before there is a model: a tokenizer.

        `samples(n)` are so many of them, spread evenly over it.
        """

    @classmethod
    def load_lines(cls, meta: Mapping[str, Any]) -> list[str]:
        """How to load an export with the library alone, in lines of Python; `meta` is its backbone.json."""
        raise NotImplementedError

    def __init__(self, config: Any, files: Path | None) -> None:
        super().__init__()
        self.config, self.files = config, files

    def meta(self) -> dict[str, Any]:
        """What backbone.json says beside the config."""
        return {}

    def check_offers(self, takes: str) -> None:
        """Raises UserError where an objective that takes `takes` cannot be given that."""
        if takes not in self.OFFERS:
            raise UserError(
                "the objective and the backbone do not fit",
                got=f"an objective of {takes}, a backbone of {self.OFFERS[0]} (library {self.config.library})",
                fix="choose another pretrain.objective.name or pretrain.backbone.library",
            )

    def offer(self, takes: str, inputs: Tensor, random: KeyedRandom) -> Tensor:
        """What an objective that takes `takes`, one of OFFERS, is given of `inputs`."""
        return inputs

    def augmented(self, inputs: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
        """One augmented view of each input, of the same kind: what evaluations compare."""
        raise NotImplementedError

    def check_size(self, size: int) -> None:
        """Raises UserError where it does not take inputs of that size."""

    def output_dim(self, output: str) -> int:
        """The width of an output of `embed.output`. Raises UserError where there is no such output."""
        raise NotImplementedError

    def take(self, inputs: Tensor, output: str) -> Tensor:
        """The output (B, output_dim) of that name."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Holds weights and BatchNorm statistics as they are, whatever `train` is called with later."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether `checkpoint_activations` was called."""
        names = ("grad_checkpointing", "gradient_checkpointing")  # timm's, transformers'
        return any(getattr(module, name, False) for module in self.modules() for name in names)

    def checkpoint_activations(self) -> None:
        """Keeps the inputs of the model's blocks only (Chen et al. 2016, https://arxiv.org/abs/1604.06174)."""
        raise NotImplementedError
