"""Self-labelling by simultaneous clustering and representation learning, SeLa (Asano et al. 2020,
https://arxiv.org/abs/1911.05371).

Every sample of the corpus has a label, one a head; training predicts it from an augmented view:

    loss = -log p(label_i | x_i)

Now and then labels are found anew, those that are the easiest to predict among all that use every label equally often:

    Q = argmin <Q, -log P> - (1 / l) H(Q),  rows of Q sum to 1, columns to N / K;    label_i = argmax_k Q_ik
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.models import Positive
from sslscale.models.collectives import gather_rows, rank
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, representation_metrics
from sslscale.objectives.clustering import HeadInit, LinearHeads, NumClusters
from sslscale.objectives.transport import transport
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class SeLa(LinearHeads):
    """Labels of equal size that are the easiest to predict."""

    labels: Tensor  # int64 (N, H)

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_clusters: NumClusters,
        num_heads: Positive = 5,
        init: HeadInit = "kmeans",
        sharpness: float = 25.0,
        refresh_epochs: float = 1.0,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters, num_heads, init)
        self.sharpness, self.refresh_epochs = sharpness, refresh_epochs
        self.register_buffer("labels", torch.zeros(0, num_heads, dtype=torch.int64), persistent=False)
        self.views = Crops({"view": recipe})

    def prepares_at(self, moment: Moment) -> bool:
        return moment.every(self.refresh_epochs)

    @torch.no_grad()
    def refresh(self, corpus: Corpus, features: Callable[[], Tensor]) -> None:
        labels = sela_labels(self.log_probs(features()), self.sharpness)
        self.labels = corpus.by_id(labels.T.contiguous())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch["view"])
        return {
            "loss": label_losses(self.log_probs(features), self.labels[batch.ids].T).mean(),
            **representation_metrics(features),
        }

    def head_losses(self, batch: Batch) -> Tensor:
        """Held-out samples have no label: they are given those of another view of them."""
        assert batch.partner is not None
        log_p, log_q = (self.log_probs(self.backbone(part["view"])) for part in (batch, batch.partner))
        everyone = gather_rows(log_q.movedim(1, 0)).movedim(0, 1)  # all labels equally often, over all ranks
        own = slice(rank() * log_q.shape[1], (rank() + 1) * log_q.shape[1])
        return label_losses(log_p, sela_labels(everyone, self.sharpness)[:, own])


def sela_labels(log_p: Tensor, sharpness: float) -> Tensor:
    """int64 (H, n), every label as often as every other, of log-probabilities (H, n, K); the paper's algorithm 1."""
    uniform = log_p.new_full((log_p.shape[2],), -math.log(log_p.shape[2]), dtype=torch.float64)
    return transport(sharpness * log_p.double(), uniform).argmax(dim=2)


def label_losses(log_p: Tensor, labels: Tensor) -> Tensor:
    """(H,): mean negative log-likelihood of labels (H, B) under log_p (H, B, K)."""
    return -log_p.gather(2, labels[:, :, None]).mean(dim=(1, 2))
