"""SimCSE (Gao et al. 2021, https://arxiv.org/abs/2104.08821): a text's two encodings among those of all other texts.

    loss_i = -log  exp(z_i . z'_i / t) / sum_k exp(z_i . z'_k / t)

with z and z' the L2-normalised projections of two passes; the loss is the mean over both directions. By default the
passes differ in dropout only; `span` and `delete` make each a different part of the text's words (Izacard et al. 2022,
https://arxiv.org/abs/2112.09118, section 3.2), as a model that starts from random weights needs.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero, Fraction
from sslscale.errors import UserError
from sslscale.models.collectives import rank
from sslscale.models.heads import mlp
from sslscale.models.text import TextBackbone
from sslscale.objectives.base import Objective, full_precision, gathered, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.text import Subsets


class SimCSE(Objective):
    """Contrastive learning of two encodings of the same text."""

    takes: ClassVar[str] = "tokens"
    needs_whole_batch: ClassVar[bool] = True

    def __init__(
        self,
        backbone: TextBackbone,
        recipe: AugmentConfig,
        *,
        temperature: AboveZero = 0.05,
        hidden_dim: int = 512,
        output_dim: int = 128,
        span: tuple[Fraction, Fraction] = (1.0, 1.0),
        delete: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0,
    ) -> None:
        super().__init__(backbone, recipe)
        drops = any(module.p for module in backbone.modules() if isinstance(module, nn.Dropout))
        if span[0] == 1.0 and not delete and not drops:
            raise UserError(
                "simcse: the two views of a text would be equal",
                fix="set a dropout in pretrain.backbone.kwargs, or objective.span or objective.delete",
            )
        self.temperature = temperature
        self.projector = mlp(backbone.feature_dim, hidden_dim, output_dim)
        self.views = Subsets(backbone.special_ids, span, delete)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))  # (2 B, D)
        z_1, z_2 = F.normalize(self.projector(features), dim=1).chunk(2)
        loss = (in_batch(z_1, z_2, self.temperature) + in_batch(z_2, z_1, self.temperature)) / 2
        return {"loss": loss, **representation_metrics(features)}


@full_precision
def in_batch(z: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Cross entropy of this rank's z (B, D) over the `other` encodings of all ranks; both L2-normalised."""
    logits = z @ gathered(other).to(z.dtype).T / temperature  # (B, W B)
    return F.cross_entropy(logits, rank() * len(z) + torch.arange(len(z), device=z.device))
