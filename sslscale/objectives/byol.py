"""BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733).

A predictor on one view's projection says what the teacher projects the other view to. There are no negatives:

    loss = |q_1 - z'_2|^2 + |q_2 - z'_1|^2

with q = predictor(projector(backbone(view))) and z' = the teacher's projection, both L2-normalised. The teacher is an
exponential moving average of backbone and projector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.models import Fraction
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import full_precision, representation_metrics
from sslscale.objectives.teacher import Teacher, TeacherObjective
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class BYOL(TeacherObjective):
    """Predicting the teacher's projection of the other view."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        momentum: Fraction = 0.996,
        hidden_dim: int = 4096,
        output_dim: int = 256,
    ) -> None:
        super().__init__(backbone, recipe)
        # No bias at the end, as in the authors' code: the predictor's BatchNorm takes it away from the student, so
        # that only rounding errors would move it, and the teacher's targets with it.
        self.projector = mlp(backbone.feature_dim, hidden_dim, output_dim, last_bias=False)
        self.predictor = mlp(output_dim, hidden_dim, output_dim)
        self.teacher = Teacher(self.backbone, self.projector, momentum=momentum)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = torch.cat([batch["view_1"], batch["view_2"]])
        features = self.backbone(images)  # (2 B, D)
        q_1, q_2 = self.predictor(self.projector(features)).chunk(2)
        z_1, z_2 = self.teacher(images).chunk(2)
        return {"loss": byol_loss(q_1, z_2) + byol_loss(q_2, z_1), **representation_metrics(features)}


@full_precision
def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """The mean squared distance of L2-normalised predictions q and targets z, both (B, D): 2 - 2 cos(q, z)."""
    return (F.normalize(q, dim=1) - F.normalize(z, dim=1)).square().sum(dim=1).mean()
