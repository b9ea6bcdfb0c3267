"""Context prediction (Doersch et al. 2015, https://arxiv.org/abs/1505.05192).

Two patches of one image, the centre of a 3 x 3 grid and one of its eight neighbours, go through the same backbone; a
head on both features says where the second lies relative to the first:

    loss = -log p(position | f(centre), f(neighbour))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import PatchObjective, classification_metrics, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.pretext import NEIGHBOUR_CELLS, PatchPair


class ContextPrediction(PatchObjective):
    """The position of one patch relative to another."""

    def __init__(
        self, backbone: Backbone, recipe: AugmentConfig, *, patch_size: int = 14, gap: int = 1, hidden_dim: int = 512
    ) -> None:
        super().__init__(backbone, recipe)
        self.head = mlp(2 * backbone.feature_dim, hidden_dim, len(NEIGHBOUR_CELLS))
        self.views = PatchPair(recipe, patch_size, gap)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["centre"], batch["neighbour"]]))  # (2 B, D)
        logits = self.head(torch.cat(features.chunk(2), dim=1))  # (B, 8)
        return {
            "loss": F.cross_entropy(logits, batch["position"]),
            **classification_metrics(logits, batch["position"]),
            **representation_metrics(features),
        }
