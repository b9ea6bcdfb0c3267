"""SwAV (Caron et al. 2020, https://arxiv.org/abs/2006.09882).

Every global view gets a code, a soft assignment to K prototypes in which all prototypes are used equally over the
global batch; every other view of the image predicts it:

    q_g = Sinkhorn(z_g C / epsilon),   loss = mean over g, v != g of  -sum_k q_gk log softmax(z_v C / t)_k

with z the L2-normalised projections, C the L2-normalised prototypes, t the temperature. No gradient flows into codes.
Local views (small crops) only predict. A queue of past projections makes the codes of small batches finer.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.config.models import Fraction, Positive
from sslscale.models.collectives import all_reduce_sum, gather_rows, rank, world_size
from sslscale.models.heads import Prototypes, mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import (
    Objective,
    by_resolution,
    check_local_size,
    representation_metrics,
    swapped_cross_entropy,
)
from sslscale.views.base import Batch
from sslscale.views.crops import Crops, multi_crop


class SwAV(Objective):
    """Swapped prediction of the views' cluster assignments."""

    needs_whole_batch: ClassVar[bool] = True
    views: Crops
    queue: Tensor  # (2, rows, D): projections of the past global batches, newest first

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_prototypes: Positive = 3000,
        temperature: AboveZero = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: Positive = 3,
        queue_batches: Annotated[int, Field(ge=0)] = 0,
        queue_start: Fraction = 0.1,
        local_crops: Annotated[int, Field(ge=0)] = 6,
        local_size: Positive | None = None,
        local_scale: tuple[Fraction, Fraction] = (0.05, 0.14),
        hidden_dim: int = 2048,
        output_dim: int = 128,
    ) -> None:
        super().__init__(backbone, recipe)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, sinkhorn_iterations
        self.queue_batches, self.queue_start = queue_batches, queue_start
        self.projector = mlp(backbone.feature_dim, hidden_dim, output_dim)
        self.prototypes = Prototypes(output_dim, num_prototypes)
        # not persistent: it grows, so only load_slow_state can restore it
        self.register_buffer("queue", torch.empty(2, 0, output_dim), persistent=False)
        self.views = multi_crop(recipe, local_crops, local_size, local_scale)
        if local_crops:
            check_local_size(backbone, self.views.recipes["local_1"].size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views = [batch[name] for name in self.views.recipes]
        features = by_resolution(self.backbone, views)  # (V B, D)
        z = self.projector(features)
        scores = self.prototypes(z).unflatten(0, (len(views), -1))  # (V, B, K)
        self._newest = F.normalize(z.detach().float(), dim=1).unflatten(0, (len(views), -1))[:2]
        codes = self._codes(scores[:2].detach())
        loss = swapped_cross_entropy(codes, scores / self.temperature)
        return {"loss": loss, **representation_metrics(features)}

    @torch.no_grad()
    def _codes(self, scores: Tensor) -> Tensor:
        """Codes (2, B, K) of this rank's global views, found together with its share of the queue's."""
        queue = self.queue[:, rank() :: world_size()]
        queued = self.prototypes(queue.flatten(0, 1)).unflatten(0, queue.shape[:2])
        together = torch.cat([scores, queued], dim=1)
        return sinkhorn(together, self.epsilon, self.iterations)[:, : scores.shape[1]]

    def after_step(self, progress: float) -> None:
        if self.queue_batches and progress >= self.queue_start:
            newest = gather_rows(self._newest.transpose(0, 1)).transpose(0, 1)  # (2, W B, D)
            self.queue = torch.cat([newest, self.queue], dim=1)[:, : self.queue_batches * newest.shape[1]]


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes of this rank's rows, with every prototype used equally over the rows of all ranks.

    scores: cosines (..., rows, K). Returns (..., rows, K), whose rows sum to 1. Alternately scales the columns and the
    rows of exp(scores / epsilon) (Cuturi 2013, https://arxiv.org/abs/1306.0895).
    """
    codes = ((scores - 1.0) / epsilon).exp()  # the shift, which the scaling undoes, keeps exp from overflowing
    for _ in range(iterations):
        codes = codes / all_reduce_sum(codes.sum(dim=-2, keepdim=True))
        codes = codes / codes.sum(dim=-1, keepdim=True)
    return codes
