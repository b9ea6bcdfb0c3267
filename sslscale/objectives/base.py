"""The contract of an objective: one idea, one nn.Module, one file. The training loop knows nothing else."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.collectives import all_gather
from sslscale.models.drop_path import draw_from
from sslscale.models.image import Backbone
from sslscale.models.norm import batch_norms
from sslscale.views.base import Batch, ViewSpec
from sslscale.views.keyed import KeyedRandom

P = ParamSpec("P")


class Corpus(Protocol):
    """What `prepare` may ask of the training data: equal answers on every rank, each of which must ask.

    `num_samples` is N; n <= N of them can be read. What is given or taken for these is in the order of their ids.
    """

    num_samples: int

    def map(self, function: Callable[[Tensor, KeyedRandom], Tensor]) -> Tensor:
        """(n, ...): `function` of the loaded samples (B, ...) and their draws, in evaluation mode, no gradients."""
        ...

    def by_id(self, values: Tensor) -> Tensor:
        """(n, ...) -> (N, ...): a table that `Batch.ids` index; zeros for what cannot be read."""
        ...

    def neighbours(self, features: Tensor, k: int) -> Tensor:
        """(n, D) -> int64 (n, k): the ids of each sample's k nearest others by cosine, nearest first."""
        ...

    def centroids(self, features: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
        """(n, D) -> (K, D): k-means centroids, Euclidean. UserError where K > n."""
        ...

    def settle(self, backbone: nn.Module) -> None:
        """Gives BatchNorm the statistics of the loaded samples, for passes in evaluation mode."""
        ...


@dataclass(frozen=True)
class Moment:
    """A place between two steps of training: `step` of `last_step` are done, `epoch_steps` make an epoch."""

    step: int
    epoch_steps: int
    last_step: int

    def every(self, epochs: float) -> bool:
        """True before the first step and after every so many epochs; 0: before the first only.

        Not where less than half as many steps are left: they would not make up for it.
        """
        period = max(1, round(epochs * self.epoch_steps)) if epochs else self.last_step
        return self.step % period == 0 and (self.step == 0 or self.last_step - self.step >= period / 2)


class Objective(nn.Module):
    """Owns the backbone, its heads and its slow state, and says which views it needs.

    What is trained is what requires a gradient; everything else is slow state. A subclass takes `(backbone, recipe)`
    and its own settings as keyword arguments with type hints: the config is validated against that signature.
    """

    config: dict[str, Any]
    """Its name and all of its settings, by which `build_objective` made it."""
    takes: ClassVar[str] = "images"
    """What its views are made of: images, clips or tokens. A backbone must offer that."""
    views: ViewSpec
    needs_whole_batch: ClassVar[bool] = False
    """The loss compares samples of one global batch, so a batch must not be split by gradient accumulation."""
    max_zero_stage: ClassVar[int] = 3
    """The highest ZeRO stage under which it trains: 2 where slow state reads whole parameters after a step."""
    further_outputs: ClassVar[tuple[str, ...]] = ()
    """What `outputs` gives beside the features: cluster_probs, score."""

    def __init__(self, backbone: Encoder, recipe: AugmentConfig) -> None:
        super().__init__()
        backbone.check_offers(self.takes)
        self.backbone = backbone
        self.register_forward_pre_hook(_draw_by_sample)

    @property
    def parts(self) -> list[Objective]:
        """The objectives that it is made of: itself, or several that share its backbone."""
        return [self]

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What it trains beside the backbone, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("backbone.")}

    def make_views(self, inputs: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        """The views of inputs (B, ...) as the backbone takes them."""
        return self.views(self.backbone.offer(self.takes, inputs, random), random)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`{"loss": scalar, ...metrics}`: the mean over this rank's share of the global batch."""
        raise NotImplementedError

    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """The backbone's inputs -> `features` (B, D), and where it has them `cluster_probs` (B, K), `score` (B,)."""
        return {"features": self.backbone(inputs)}

    def prepares_at(self, moment: Moment) -> bool:
        """Whether `prepare` is to be called then."""
        return False

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        """What needs passes over the whole corpus. Writes slow state; at step 0 it may set trained parameters too."""

    def partners(self, ids: Tensor, random: KeyedRandom) -> Tensor | None:
        """int64 (B,): the sample that is read beside each of `ids` (B,) and becomes `Batch.partner`; None: none is."""
        return None

    def evaluate(self, inputs: Tensor, random: KeyedRandom) -> dict[str, float]:
        """Measures without labels on held-out inputs, this rank's share; equal on every rank.

        It leaves no trace in training.
        """
        return {}

    def held_out_batch(self, inputs: Tensor, random: KeyedRandom) -> Batch:
        """Views of inputs that have no place in the corpus, and so no ids; each sample is its own partner."""
        nowhere = random.keys.new_empty(0)
        beside = random.fold("partner")
        partner = Batch(self.make_views(inputs, beside.fold("views")), beside.fold("objective"), nowhere)
        return Batch(self.make_views(inputs, random.fold("views")), random.fold("objective"), nowhere, partner)

    def after_step(self, progress: float) -> None:
        """Updates slow state after a step; `progress` runs from 0 to 1. Never writes a trained parameter."""

    def batch_norms(self) -> list[nn.Module]:
        """Those whose running moments, slow state that `forward` writes, are put back where a step is not applied."""
        return batch_norms(self)

    def slow_state(self) -> dict[str, Any]:
        """Everything that is not trained and must survive a restart; equal on every rank."""
        return {name: buffer.detach().clone() for name, buffer in self.named_buffers()}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """The inverse of `slow_state`. Tables that grow with the corpus or with training take its size."""
        buffers = dict(self.named_buffers())
        assert buffers.keys() == state.keys(), "slow state belongs to another objective"
        for name, buffer in buffers.items():
            buffer.resize_(state[name].shape).copy_(state[name])


class PatchObjective(Objective):
    """An objective whose backbone is trained on patches, but gives features of whole images.

    At the end its BatchNorm therefore gets the statistics of whole images, instead of those of patches.
    """

    def prepares_at(self, moment: Moment) -> bool:
        return moment.step == moment.last_step

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        corpus.settle(self.backbone)


def _draw_by_sample(objective: nn.Module, arguments: tuple[Batch]) -> None:
    assert isinstance(objective, Objective)
    draw_from(objective.backbone, arguments[0].random.fold("drop_path"))


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


@full_precision
def swapped_cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """The mean of -sum_k targets_g log softmax(logits_v) over samples and over pairs of different views g != v.

    targets: (G, B, K), of the first G of the V views whose logits are (V, B, K).
    """
    pairs = -torch.einsum("gbk,vbk->gv", targets, logits.log_softmax(dim=-1)) / logits.shape[1]
    return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - len(targets))
