"""Deep SVDD (Ruff et al. 2018, http://proceedings.mlr.press/v80/ruff18a.html).

Samples are drawn towards a fixed centre c, and the score of a sample is how far it stays away:

    loss = mean_i |z_i - c|^2,    score(x) = |z - c|^2

z is a linear projection of the backbone's features. c is the mean of z before training, with coordinates near 0 moved
away from it; there is no bias that is trained, in the projection or in the backbone: else all of z would become c
whatever the input (propositions 1 and 2 there). Weight decay is the optimizer's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Positive
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, Objective, full_precision, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops
from sslscale.views.keyed import KeyedRandom


class DeepSVDD(Objective):
    """The distance from a hypersphere's centre."""

    further_outputs: ClassVar[tuple[str, ...]] = ("score",)
    centre: Tensor  # (output_dim,)

    def __init__(
        self, backbone: Backbone, recipe: AugmentConfig, *, output_dim: Positive = 32, least_coordinate: float = 0.1
    ) -> None:
        super().__init__(backbone, recipe)
        self.least_coordinate = least_coordinate
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(False)
        self.projector = nn.Linear(backbone.feature_dim, output_dim, bias=False)
        self.register_buffer("centre", torch.zeros(output_dim))
        self.views = Crops({"view": recipe})

    def prepares_at(self, moment: Moment) -> bool:
        return moment.step == 0

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        z = corpus.map(lambda images, _: self.projector(self.backbone(images)))
        self.centre.copy_(sphere_centre(z, self.least_coordinate))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch["view"])
        distances = squared_distance(self.projector(features), self.centre)
        return {"loss": distances.mean(), **representation_metrics(features)}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {"features": features, "score": squared_distance(self.projector(features), self.centre)}

    @torch.no_grad()
    def evaluate(self, images: Tensor, random: KeyedRandom) -> dict[str, float]:
        """`held_out_loss` of the images themselves."""
        return {"held_out_loss": float(all_reduce_mean(self.outputs(images)["score"].mean()))}


def sphere_centre(z: Tensor, least: float) -> Tensor:
    """The mean (D,) of z (n, D), coordinates closer than `least` to 0 moved to +-least."""
    mean = z.mean(dim=0)
    return torch.where(mean < 0, mean.clamp(max=-least), mean.clamp(min=least))


@full_precision
def squared_distance(z: Tensor, centre: Tensor) -> Tensor:
    """(B,) of z (B, D)."""
    return (z - centre).square().sum(dim=1)
