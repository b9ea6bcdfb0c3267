"""SimSiam (Chen & He 2020, https://arxiv.org/abs/2011.10566).

A predictor on one view's projection says what the other view's is; no gradient flows into what is predicted:

    loss = 1/2 D(p_1, stopgrad(z_2)) + 1/2 D(p_2, stopgrad(z_1)),  D(p, z) = -cos(p, z)

with z = projector(backbone(view)) and p = predictor(z).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, full_precision, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class SimSiam(Objective):
    """Predicting the projection of the other view, with a stopped gradient instead of negatives or a teacher."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        output_dim: int = 2048,
        predictor_dim: int = 512,
    ) -> None:
        super().__init__(backbone, recipe)
        self.projector = mlp(backbone.feature_dim, output_dim, output_dim, output_dim, last_norm=True)
        self.predictor = mlp(output_dim, predictor_dim, output_dim)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))  # (2 B, D)
        z = self.projector(features)
        p_1, p_2 = self.predictor(z).chunk(2)
        z_1, z_2 = z.detach().chunk(2)
        loss = (negative_cosine(p_1, z_2) + negative_cosine(p_2, z_1)) / 2
        return {"loss": loss, **representation_metrics(features)}


@full_precision
def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """The mean over samples of -cos(p, z), both (B, D)."""
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(dim=1).mean()
