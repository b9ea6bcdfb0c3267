"""Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230).

The cross-correlation of two views' projections, over the global batch, is drawn to the identity: what two views share
is kept, and no two dimensions say the same.

    C_ij = mean_b(z_1[b, i] z_2[b, j]),   loss = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2

with every dimension of z_1 and z_2 standardised over the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, full_precision, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class BarlowTwins(Objective):
    """Redundancy reduction between the projections of two views."""

    needs_whole_batch: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        off_diagonal_weight: float = 5e-3,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
    ) -> None:
        super().__init__(backbone, recipe)
        self.off_diagonal_weight = off_diagonal_weight
        self.projector = mlp(backbone.feature_dim, hidden_dim, hidden_dim, output_dim)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))  # (2 B, D)
        z_1, z_2 = self.projector(features).chunk(2)
        return {"loss": barlow_twins_loss(z_1, z_2, self.off_diagonal_weight), **representation_metrics(features)}


@full_precision
def barlow_twins_loss(z_1: Tensor, z_2: Tensor, off_diagonal_weight: float) -> Tensor:
    """The loss of the global batch, the same on every rank; z_1, z_2: this rank's projections (B, D)."""
    correlation = all_reduce_mean(_standardised(z_1).T @ _standardised(z_2) / len(z_1))  # (D, D)
    identity = torch.eye(len(correlation), device=correlation.device, dtype=correlation.dtype)
    weights = torch.full_like(correlation, off_diagonal_weight).fill_diagonal_(1.0)
    return (weights * (correlation - identity).square()).sum()


def _standardised(z: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, D) with mean 0 and variance 1 over the global batch in every dimension."""
    centred = z - all_reduce_mean(z.mean(dim=0))
    return centred / (all_reduce_mean(centred.square().mean(dim=0)) + eps).sqrt()
