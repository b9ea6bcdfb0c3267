"""Anomalies by geometric transformations (GEOM: Golan & El-Yaniv 2018, https://arxiv.org/abs/1805.10917).

A classifier says which of T transformations an image went through; it learns that of normal images only, so an image is
the more anomalous, the less likely its transformations are found to be:

    loss = -mean log p(t | T_t x),    score(x) = -mean_t log p(t | T_t x)

(the paper's simplified score, section 4.2, as a log-likelihood).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Fraction, Positive
from sslscale.errors import UserError
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, classification_metrics, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom
from sslscale.views.transforms import Transformed, transform, transformations


class TransformLikelihood(Objective):
    """How unlikely an image's own transformations are."""

    further_outputs: ClassVar[tuple[str, ...]] = ("score",)

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        flip: bool = True,
        shift: Fraction = 0.25,
        copies: Positive = 8,
    ) -> None:
        super().__init__(backbone, recipe)
        self.maps = transformations(flip, shift)
        if copies > len(self.maps):
            raise UserError("more copies than transformations", got=copies, allowed=f"1 to {len(self.maps)}")
        self.head = nn.Linear(backbone.feature_dim, len(self.maps))
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

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)  # of the first transformation, the identity
        total = images.new_zeros(len(images))
        frames = images.flatten(0, -4)  # of clips, each is an image; images stay as they are
        for place, own in enumerate(self.maps):
            moved = transform(frames, own.expand(len(frames), -1, -1)).view_as(images) if place else images
            x = self.backbone(moved) if place else features
            total = total + self.head(x).float().log_softmax(dim=1)[:, place]
        return {"features": features, "score": -total / len(self.maps)}

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, random: KeyedRandom) -> dict[str, float]:
        """`held_out_loss`."""
        return {"held_out_loss": float(all_reduce_mean(self(self.held_out_batch(inputs, random))["loss"]))}
