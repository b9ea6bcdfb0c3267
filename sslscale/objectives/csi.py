"""CSI, contrasting shifted instances (Tack et al. 2020, https://arxiv.org/abs/2007.08176).

SimCLR in which the quarter turns S of an image count as other images, and a classifier that tells the turns apart:

    loss = NT-Xent over all turned views  -  lambda mean log p(S | turned view)

A sample is normal where its projections are long and point where those of training samples do, and where its turns
are told apart (equations 6 to 9); with z the projection, z_m those of training samples, both of the same turn:

    score(x) = -sum_S  a_S max_m cos(z(Sx), z_m) |z(Sx)|  +  b_S logit_S(Sx)

a_S and b_S balance the terms: the reciprocal of each one's mean over the training samples.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.config.models import Positive
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import (
    Corpus,
    Moment,
    Objective,
    classification_metrics,
    full_precision,
    representation_metrics,
)
from sslscale.objectives.simclr import nt_xent
from sslscale.views.base import Batch
from sslscale.views.crops import Crops
from sslscale.views.keyed import KeyedRandom

TURNS = 4


class CSI(Objective):
    """Contrasting shifted instances, the shifts being quarter turns."""

    needs_whole_batch: ClassVar[bool] = True
    further_outputs: ClassVar[tuple[str, ...]] = ("score",)
    bank: Tensor  # (TURNS, M, D): unit projections of M training samples
    scale: Tensor  # (2, TURNS): a and b

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        temperature: AboveZero = 0.5,
        shift_weight: float = 1.0,
        hidden_dim: Positive = 512,
        output_dim: Positive = 128,
        bank_size: Positive = 512,
    ) -> None:
        super().__init__(backbone, recipe)
        self.temperature, self.shift_weight = temperature, shift_weight
        self.projector = mlp(backbone.feature_dim, hidden_dim, output_dim)
        self.shift_head = nn.Linear(backbone.feature_dim, TURNS)
        self.register_buffer("bank", torch.zeros(TURNS, bank_size, output_dim))
        self.register_buffer("scale", torch.ones(2, TURNS))
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        turned = torch.cat([turns(batch[name]) for name in ("view_1", "view_2")])  # (2 TURNS B, C, S, S)
        features = self.backbone(turned)
        z_1, z_2 = F.normalize(self.projector(features), dim=1).chunk(2)
        logits = self.shift_head(features)
        which = torch.arange(TURNS, device=logits.device).repeat_interleave(len(batch)).repeat(2)
        loss = nt_xent(z_1, z_2, self.temperature) + self.shift_weight * F.cross_entropy(logits, which)
        return {"loss": loss, **classification_metrics(logits, which), **representation_metrics(features)}

    def prepares_at(self, moment: Moment) -> bool:
        return moment.step == moment.last_step

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        """The bank, of samples spread evenly over the corpus, and the scales."""

        def of_turns(images: Tensor, _: KeyedRandom) -> Tensor:
            z, logits = self._of_turns(images)[1:]
            return torch.cat([z, logits[:, :, None]], dim=2).movedim(0, 1)  # (B, TURNS, D + 1)

        z, logits = corpus.map(of_turns).movedim(1, 0).split([self.bank.shape[2], 1], dim=2)
        places = torch.linspace(0, z.shape[1] - 1, self.bank.shape[1], device=z.device).round().long()
        self.bank.copy_(F.normalize(z[:, places], dim=2))
        self.scale.copy_(1.0 / torch.stack([z.norm(dim=2).mean(dim=1), logits.mean(dim=(1, 2))]))

    def _of_turns(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, S, S) -> features (TURNS, B, D), projections (TURNS, B, D'), logits of the own turn (TURNS, B)."""
        features = self.backbone(turns(images))
        z, logits = self.projector(features), self.shift_head(features)
        own = logits.unflatten(0, (TURNS, -1)).diagonal(dim1=0, dim2=2).T
        return features.unflatten(0, (TURNS, -1)), z.unflatten(0, (TURNS, -1)), own

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        features, z, logits = self._of_turns(images)
        return {"features": features[0], "score": csi_score(z, self.bank, logits, self.scale)}


def turns(images: Tensor) -> Tensor:
    """(B, ..., S, S) -> (TURNS B, ..., S, S): all of them unturned, then all turned once, and so on."""
    return torch.cat([torch.rot90(images, k, dims=(-2, -1)) for k in range(TURNS)])


@full_precision
def csi_score(z: Tensor, bank: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
    """(B,), high: anomalous. Projections z (T, B, D), bank (T, M, D), logits of the own turn (T, B), scale (2, T)."""
    nearest = (F.normalize(z, dim=2) @ bank.transpose(1, 2)).amax(dim=2)  # (T, B)
    return -(scale[0, :, None] * nearest * z.norm(dim=2) + scale[1, :, None] * logits).sum(dim=0)
