"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709).

Two views of every image are pulled together and pushed from all other views of the global batch (NT-Xent):

    loss_i = -log  exp(z_i . z_j(i) / t) / sum_{k != i} exp(z_i . z_k / t)

with z the L2-normalised projections of the 2 N views, j(i) the other view of i's image and t the temperature.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.models.collectives import rank
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, full_precision, gathered, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class SimCLR(Objective):
    """Contrastive learning of two augmented views."""

    needs_whole_batch: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        temperature: AboveZero = 0.5,
        hidden_dim: int = 512,
        output_dim: int = 128,
    ) -> None:
        super().__init__(backbone, recipe)
        self.temperature = temperature
        self.projector = mlp(backbone.feature_dim, hidden_dim, output_dim)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))  # (2 B, D)
        z_1, z_2 = F.normalize(self.projector(features), dim=1).chunk(2)
        return {"loss": nt_xent(z_1, z_2, self.temperature), **representation_metrics(features)}


@full_precision
def nt_xent(z_1: Tensor, z_2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of this rank's views against the views of all ranks; z_1, z_2: (B, D), L2-normalised."""
    batch = len(z_1)
    local = torch.stack([z_1, z_2])  # (2, B, D)
    everyone = gathered(local.transpose(0, 1)).transpose(0, 1)  # (2, W B, D)
    logits = local.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature  # (2 B, 2 W B)
    own = rank() * batch + torch.arange(batch, device=logits.device)
    total = everyone.shape[1]
    itself = torch.cat([own, total + own])
    positive = torch.cat([total + own, own])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, positive)
