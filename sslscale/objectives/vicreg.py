"""VICReg (Bardes, Ponce & LeCun 2021, https://arxiv.org/abs/2105.04906).

Projections of two views are close (invariance), every dimension keeps a standard deviation of 1 over the global batch
(variance), and no two dimensions are correlated (covariance):

    loss = lambda mean((z_1 - z_2)^2) + mu [v(z_1) + v(z_2)] + nu [c(z_1) + c(z_2)]
    v(z) = 1/D sum_i max(0, 1 - sqrt(var(z_i) + eps)),   c(z) = 1/D sum_{i != j} cov(z_i, z_j)^2

The invariance is the mean over samples and dimensions, as in the paper's algorithm 1, which the default weights go
with; equation 5 sums over dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.models.collectives import all_reduce_mean, all_reduce_sum, world_size
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, full_precision, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class VICReg(Objective):
    """Variance, invariance and covariance of the projections of two views."""

    needs_whole_batch: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
    ) -> None:
        super().__init__(backbone, recipe)
        self.weights = (invariance_weight, variance_weight, covariance_weight)
        self.projector = mlp(backbone.feature_dim, hidden_dim, hidden_dim, output_dim)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))  # (2 B, D)
        z_1, z_2 = self.projector(features).chunk(2)
        return {"loss": vicreg_loss(z_1, z_2, *self.weights), **representation_metrics(features)}


@full_precision
def vicreg_loss(
    z_1: Tensor, z_2: Tensor, invariance_weight: float, variance_weight: float, covariance_weight: float
) -> Tensor:
    """z_1, z_2: this rank's projections (B, D); variance and covariance are those of the global batch."""
    loss = invariance_weight * F.mse_loss(z_1, z_2)
    for z in (z_1, z_2):
        covariance = _covariance(z)
        variance = covariance.diagonal()
        spread = F.relu(1.0 - (variance + 1e-4).sqrt()).mean()
        redundancy = (covariance - torch.diag(variance)).square().sum() / len(covariance)
        loss = loss + variance_weight * spread + covariance_weight * redundancy
    return loss


def _covariance(z: Tensor) -> Tensor:
    """(B, D) on every rank -> the unbiased covariance (D, D) of the global batch."""
    centred = z - all_reduce_mean(z.mean(dim=0))
    return all_reduce_sum(centred.T @ centred) / (len(z) * world_size() - 1)
