"""MoCo v3 (Chen, Xie & He 2021, https://arxiv.org/abs/2104.02057).

One view's prediction q is pulled to the teacher's key k of the other view, and pushed from the keys of all other
images of the global batch; there is no queue:

    ctr(q, k) = -2 t log  exp(q_i . k_i / t) / sum_j exp(q_i . k_j / t),   loss = ctr(q_1, k_2) + ctr(q_2, k_1)

with q = predictor(projector(backbone(view))) and k = the teacher's projection, both L2-normalised, t the temperature.
A ViT's patch embedding stays at its random weights (`freeze_patch_embed`): trained, it makes the training unstable
(section 4.2).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.config.models import Fraction
from sslscale.models.collectives import gather_rows, rank
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import full_precision, representation_metrics
from sslscale.objectives.teacher import Teacher, TeacherObjective
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class MoCoV3(TeacherObjective):
    """Contrastive learning against a teacher's keys."""

    needs_whole_batch: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        temperature: AboveZero = 0.2,
        momentum: Fraction = 0.99,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        freeze_patch_embed: bool = True,
    ) -> None:
        super().__init__(backbone, recipe)
        patch_embed = getattr(backbone.model, "patch_embed", None)
        if freeze_patch_embed and patch_embed is not None:
            patch_embed.requires_grad_(False)
        self.temperature = temperature
        self.projector = mlp(backbone.feature_dim, hidden_dim, hidden_dim, output_dim, last_norm=True)
        self.predictor = mlp(output_dim, hidden_dim, output_dim, last_norm=True)
        self.teacher = Teacher(self.backbone, self.projector, momentum=momentum)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = torch.cat([batch["view_1"], batch["view_2"]])
        features = self.backbone(images)  # (2 B, D)
        q_1, q_2 = self.predictor(self.projector(features)).chunk(2)
        k_1, k_2 = self.teacher(images).chunk(2)
        loss = contrast(q_1, k_2, self.temperature) + contrast(q_2, k_1, self.temperature)
        return {"loss": loss, **representation_metrics(features)}


@full_precision
def contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """InfoNCE times 2 t of this rank's queries q (B, D) against the keys k (B, D) of all ranks."""
    keys = gather_rows(F.normalize(k, dim=1))  # (W B, D)
    logits = F.normalize(q, dim=1) @ keys.T / temperature
    own = rank() * len(q) + torch.arange(len(q), device=q.device)
    return 2.0 * temperature * F.cross_entropy(logits, own)
