"""The contract of an objective: one idea, one nn.Module, one file. The training loop knows nothing else."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, ParamSpec, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.collectives import all_gather
from sslscale.models.image import Backbone
from sslscale.views.base import Batch, ViewSpec

P = ParamSpec("P")


class Corpus(Protocol):
    """What `prepare` may ask of the training data; handed in by the caller, so that no import goes upward."""

    def features(self) -> Tensor:
        """(N, D) features of the training set under the objective's present backbone, in sample-id order."""
        ...

    def neighbours(self, k: int) -> Tensor:
        """int64 (N, k): ids of each sample's k nearest others in those features, nearest first."""
        ...

    def centroids(self, num_clusters: int) -> Tensor:
        """(K, D) k-means centroids of those features."""
        ...


class Objective(nn.Module):
    """Owns the backbone, its heads and its slow state, and says which views it needs.

    What is trained is what requires a gradient; everything else is slow state. A subclass takes `(backbone, recipe)`
    and its own settings as keyword arguments with type hints: the config is validated against that signature.
    """

    views: ViewSpec
    needs_whole_batch: ClassVar[bool] = False
    """The loss compares samples of one global batch, so a batch must not be split by gradient accumulation."""
    max_zero_stage: ClassVar[int] = 3
    """The highest ZeRO stage under which it trains: 2 where slow state reads whole parameters after a step."""

    def __init__(self, backbone: Backbone, recipe: AugmentConfig) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`{"loss": scalar, ...metrics}`: the mean over this rank's share of the global batch."""
        raise NotImplementedError

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) in [0, 1] -> `features` (B, D), and where it has them `cluster_probs` (B, K), `score` (B,)."""
        return {"features": self.backbone(images)}

    def prepare(self, corpus: Corpus, step: int) -> None:
        """At declared steps: what needs a pass over the whole corpus."""

    def after_step(self, progress: float) -> None:
        """Updates slow state after a step; `progress` runs from 0 to 1. Never writes a trained parameter."""

    def slow_state(self) -> dict[str, Any]:
        """Everything that is not trained and must survive a restart; equal on every rank."""
        return {name: buffer.detach().clone() for name, buffer in self.named_buffers()}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """The inverse of `slow_state`."""
        buffers = dict(self.named_buffers())
        assert buffers.keys() == state.keys(), "slow state belongs to another objective"
        for name, buffer in buffers.items():
            buffer.copy_(state[name])


@torch.no_grad()
def classification_metrics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Accuracy of a pretext classifier: logits (B, K), targets (B,)."""
    return {"accuracy": (logits.argmax(dim=1) == targets).float().mean()}


@torch.no_grad()
def representation_metrics(z: Tensor) -> dict[str, Tensor]:
    """`feature_std`: the mean over dimensions of the standard deviation of L2-normalised z (B, D), times sqrt(D).

    1 for features spread evenly over the sphere, 0 when all are the same: the first sign of a collapse.
    """
    return {"feature_std": F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5}


def gathered(z: Tensor) -> Tensor:
    """(B, D) in float32 at least, from every rank: (W B, D), differentiable. Losses across a batch start here."""
    return all_gather(z if z.dtype == torch.float64 else z.float())


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Runs a loss outside autocast, with half-precision arguments in float32: temperatures magnify rounding."""

    @functools.wraps(loss)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        halves = (torch.float16, torch.bfloat16)
        full = [a.float() if isinstance(a, Tensor) and a.dtype in halves else a for a in args]
        device = next(a.device.type for a in full if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*full, **kwargs)  # type: ignore[arg-type]

    return wrapped


def by_resolution(network: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """V views (B, C, S, S), neighbours of one size in one pass: (V B, D), in the order of `views`."""
    passes = (torch.cat(list(group)) for _, group in itertools.groupby(views, key=lambda view: view.shape[-1]))
    return torch.cat([network(images) for images in passes])


def check_local_size(backbone: Backbone, size: int) -> None:
    """Refuses local views of a size that a ViT's patches do not tile, or that it does not take at all."""
    model = backbone.model
    if not hasattr(model, "dynamic_img_size"):
        return  # no ViT: convolutions take any size
    patch: int = model.patch_embed.patch_size[0]  # type: ignore[union-attr, index, assignment]
    if not model.dynamic_img_size or size % patch:
        raise UserError(
            "the ViT does not take the local views",
            got=f"local views of {size}, patches of {patch}, dynamic_img_size={model.dynamic_img_size}",
            fix=f"set backbone.kwargs.dynamic_img_size=true and a local_size that {patch} divides, or local_crops=0",
        )


def swapped_cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """The mean of -sum_k targets_g log softmax(logits_v) over samples and over pairs of different views g != v.

    targets: (G, B, K), of the first G of the V views whose logits are (V, B, K).
    """
    pairs = -torch.einsum("gbk,vbk->gv", targets, logits.log_softmax(dim=-1)) / logits.shape[1]
    return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - len(targets))
