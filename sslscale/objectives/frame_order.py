"""The order of a clip's frames (Misra et al. 2016, https://arxiv.org/abs/1603.08561; as classes: Lee et al. 2017,
https://arxiv.org/abs/1708.01246; of pieces with motion inside: Xu et al. 2019, clip order prediction).

A clip is cut into n pieces, which are shuffled; which of the n! / 2 orders (up to reversal) it was is told from the
backbone's states s_1 ... s_S along the shuffled clip:

    loss = -log softmax(head([s_1, ..., s_S]))[order]
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.heads import mlp
from sslscale.objectives.base import Objective, classification_metrics, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.video import ShuffledPieces


class FrameOrder(Objective):
    """Which order the pieces of a clip were put into. `backbone` has `sequence`: clips -> states (B, S, D), and S."""

    takes: ClassVar[str] = "clips"
    backbone: Any

    def __init__(
        self,
        backbone: Encoder,
        recipe: AugmentConfig,
        *,
        pieces: Annotated[int, Field(ge=3, le=5)] = 4,
        hidden_dim: int = 256,
    ) -> None:
        super().__init__(backbone, recipe)
        frames = backbone.config.frames
        if frames % pieces:
            raise UserError(
                "frame_order: the pieces do not divide the clip",
                got=f"objective.pieces={pieces}, backbone.frames={frames}",
                fix="set backbone.frames to a multiple of objective.pieces",
            )
        self.views = ShuffledPieces(recipe, pieces)
        self.head = mlp(
            self.backbone.num_states * backbone.feature_dim, hidden_dim, len(self.views.orders), last_norm=False
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        states = self.backbone.sequence(batch["view"])  # (B, S, D)
        logits, order = self.head(states.flatten(1)).float(), batch["order"]
        return {
            "loss": F.cross_entropy(logits, order),
            **classification_metrics(logits, order),
            **representation_metrics(states.mean(dim=1)),
        }
