"""Invariant information clustering (Ji et al. 2019, https://arxiv.org/abs/1807.06653).

Two views of every sample; P is the joint distribution of their clusters over the global batch, made symmetric:

    P = (1 / n) sum_i p(x_i) p(x'_i)^T,    loss = -sum_cc' P_cc' (log P_cc' - a log P_c - a log P_c')

which is the negative mutual information for a = 1; a > 1 weighs the entropies (section 3.2 and the authors' code). A
second set of heads with more clusters is trained beside the first and given up afterwards (section 3.3).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Positive
from sslscale.models.image import Backbone
from sslscale.objectives.base import full_precision, gathered, representation_metrics
from sslscale.objectives.clustering import HeadInit, LinearHeads, NumClusters, safe_log, split_heads
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class IIC(LinearHeads):
    """Clusters of two views that tell the most about each other."""

    needs_whole_batch: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_clusters: NumClusters,
        num_heads: Positive = 5,
        init: HeadInit = "kmeans",
        over_clusters: Annotated[int, Field(ge=0)] = 0,
        entropy_weight: float = 1.0,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters, num_heads, init)
        self.entropy_weight = entropy_weight
        self.over_head = nn.Linear(backbone.feature_dim, num_heads * over_clusters) if over_clusters else None
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))  # (2 B, D)
        loss = self._losses(self.log_probs(features)).mean()
        if self.over_head is not None:
            loss = (loss + self._losses(split_heads(self.over_head(features), self.num_heads)).mean()) / 2
        return {"loss": loss, **representation_metrics(features)}

    def head_losses(self, batch: Batch) -> Tensor:
        return self._losses(self.log_probs(self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))))

    def _losses(self, log_p: Tensor) -> Tensor:
        view_1, view_2 = log_p.chunk(2, dim=1)
        return iic_losses(view_1, view_2, self.entropy_weight)


@full_precision
def iic_losses(log_p: Tensor, log_q: Tensor, entropy_weight: float) -> Tensor:
    """(H,): log-probabilities (H, B, K) of two views of this rank's samples; P is of all ranks'."""
    p, q = (gathered(log.exp().movedim(0, 1)) for log in (log_p, log_q))  # (W B, H, K)
    joint = torch.einsum("bhi,bhj->hij", p, q) / len(p)
    joint = (joint + joint.transpose(1, 2)) / 2
    marginal = safe_log(joint.sum(dim=2))  # (H, K)
    information = safe_log(joint) - entropy_weight * (marginal[:, :, None] + marginal[:, None, :])
    return -(joint * information).sum(dim=(1, 2))
