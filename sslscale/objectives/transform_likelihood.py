"""Anomalies by geometric transformations (GEOM: Golan & El-Yaniv 2018, https://arxiv.org/abs/1805.10917).

A classifier says which of T transformations an image went through; it learns that of normal images only, so an image is
the more anomalous, the less likely its transformations are found to be:

    loss = -mean log y_t(T_t x),    score(x) = -sum_t (alpha_t - 1) . log y(T_t x)

with y the classifier's probabilities. alpha_t, one parameter a transformation, is that of the Dirichlet distribution
that fits y(T_t x) of the training images best, found after the last step (section 4.2 and algorithm 1): which mistakes
normal images lead to counts as well as how often. The "simplified" score is -mean_t log y_t(T_t x), the same with
alpha_t - 1 = e_t / T.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Fraction, Positive
from sslscale.errors import UserError
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, Objective, classification_metrics, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom
from sslscale.views.transforms import Transformed, transform, transformations

_HELD_OUT = 128  # samples of a pass of an evaluation


class TransformLikelihood(Objective):
    """How unlikely an image's own transformations are."""

    further_outputs: ClassVar[tuple[str, ...]] = ("score",)
    weights: Tensor  # (T, T), alpha_t - 1

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        flip: bool = True,
        shift: Fraction = 0.25,
        copies: Positive = 8,
        score: Literal["dirichlet", "simplified"] = "dirichlet",
    ) -> None:
        super().__init__(backbone, recipe)
        self.maps = transformations(flip, shift)
        if copies > len(self.maps):
            raise UserError("more copies than transformations", got=copies, allowed=f"1 to {len(self.maps)}")
        self.head = nn.Linear(backbone.feature_dim, len(self.maps))
        self.score = score
        self.register_buffer("weights", torch.eye(len(self.maps)) / len(self.maps))
        self.views = Transformed(recipe, self.maps, copies)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views = batch["views"].transpose(0, 1).flatten(0, 1)  # the first copy of every image first
        which = batch["which"].T.flatten()
        features = self.backbone(views)
        logits = self.head(features)
        return {
            "loss": F.cross_entropy(logits, which),
            **classification_metrics(logits, which),
            **representation_metrics(features),
        }

    def prepares_at(self, moment: Moment) -> bool:
        return self.score == "dirichlet" and moment.step == moment.last_step

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        def log_y(images: Tensor, _: KeyedRandom, place: int) -> Tensor:
            return self._log_y(self._transformed(images, place))[0]

        for place in range(len(self.maps)):  # a pass each: what it keeps of a sample is T numbers, not T^2
            self.weights[place] = dirichlet_mle(corpus.map(functools.partial(log_y, place=place))) - 1

    def _transformed(self, images: Tensor, place: int) -> Tensor:
        if place == 0:  # the identity
            return images
        frames = images.flatten(0, -4)  # of clips, each is an image; images stay as they are
        return transform(frames, self.maps[place].expand(len(frames), -1, -1)).view_as(images)

    def _log_y(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return self.head(features).float().log_softmax(dim=1), features

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        log_y, features = self._log_y(images)
        score = -(log_y @ self.weights[0])
        for place in range(1, len(self.maps)):
            score -= self._log_y(self._transformed(images, place))[0] @ self.weights[place]
        return {"features": features, "score": score}

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, random: KeyedRandom) -> dict[str, float]:
        """`held_out_loss`."""
        losses = inputs.new_zeros(len(inputs))
        for start in range(0, len(inputs), _HELD_OUT):  # each is a view many times over
            own = slice(start, start + _HELD_OUT)
            losses[own] = self(self.held_out_batch(inputs[own], KeyedRandom(random.keys[own])))["loss"]
        return {"held_out_loss": float(all_reduce_mean(losses.mean()))}


def dirichlet_mle(log_y: Tensor, iterations: int = 1000) -> Tensor:
    """(K,): the Dirichlet parameter that makes rows (n, K), given by their logarithms, the most likely.

    By the fixed point psi(alpha_k) = psi(sum alpha) + mean log y_k (Minka 2000, "Estimating a Dirichlet distribution",
    section 1), which needs those means only, from a start at the rows' mean.
    """
    logs = log_y.double()
    target, mean = logs.mean(dim=0), logs.exp().mean(dim=0)
    # the sum that Wicker et al. (2008) start from: of the Kullback-Leibler divergence of the rows from their mean
    spread = (mean * (mean.clamp(min=torch.finfo(mean.dtype).tiny).log() - target)).sum()
    alpha = mean * (len(mean) - 1) * -torch.digamma(torch.ones_like(spread)) / spread.clamp(min=1e-6)
    alpha = alpha.clamp(min=1e-6)
    for _ in range(iterations):
        before, alpha = alpha, _inverse_digamma(torch.digamma(alpha.sum()) + target)
        if torch.allclose(alpha, before, rtol=1e-6, atol=0.0):
            break
    return alpha.to(log_y.dtype)


def _inverse_digamma(y: Tensor) -> Tensor:
    """x > 0 with psi(x) = y, by Newton's method from Minka's start (appendix C), which five steps make exact."""
    x = torch.where(y >= -2.22, y.exp() + 0.5, -1.0 / (y - torch.digamma(torch.ones_like(y))))
    for _ in range(5):
        x = x - (torch.digamma(x) - y) / torch.polygamma(1, x)
    return x
