"""Rotation prediction, "RotNet" (Gidaris et al. 2018, https://arxiv.org/abs/1803.07728).

Each image is turned by 0, 90, 180 or 270 degrees; a linear head on the backbone says by which:

    loss = -log p(turns | rotated image)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, classification_metrics, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.pretext import Rotated


class Rotation(Objective):
    """Which of four quarter turns was applied."""

    def __init__(self, backbone: Backbone, recipe: AugmentConfig) -> None:
        super().__init__(backbone, recipe)
        self.head = nn.Linear(backbone.feature_dim, 4)
        self.views = Rotated(recipe)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch["view"])
        logits = self.head(features)
        return {
            "loss": F.cross_entropy(logits, batch["turns"]),
            **classification_metrics(logits, batch["turns"]),
            **representation_metrics(features),
        }
