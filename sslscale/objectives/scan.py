"""SCAN (Van Gansbeke et al. 2020, https://arxiv.org/abs/2005.12320).

A sample and one of its nearest neighbours in feature space are to fall into the same cluster, and all clusters are to
be used; with p the cluster probabilities of a view:

    loss = -mean_i log <p(x_i), p(neighbour of x_i)>  -  lambda H(mean_i p(x_i))

(the entropy enters as a reward: section 2.2). In the last `self_label_share` of the steps, confident samples teach:
where the still image's largest probability is above `confidence`, its cluster is the label of the augmented view,
every cluster weighing the same (section 2.3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.models import Fraction, Positive
from sslscale.models.collectives import world_size
from sslscale.models.image import Backbone
from sslscale.objectives.base import full_precision, gathered, representation_metrics
from sslscale.objectives.clustering import HeadInit, NeighbourClustering, NumClusters, safe_log
from sslscale.views.base import Batch
from sslscale.views.crops import Crops, still


class SCAN(NeighbourClustering):
    """Semantic clustering by adopting nearest neighbours."""

    needs_whole_batch: ClassVar[bool] = True
    progress: Tensor

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_clusters: NumClusters,
        num_heads: Positive = 5,
        init: HeadInit = "kmeans",
        num_neighbours: Positive = 20,
        entropy_weight: float = 5.0,
        refresh_epochs: float = 0.0,
        self_label_share: Fraction = 0.0,
        confidence: Fraction = 0.99,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters, num_heads, init, num_neighbours, refresh_epochs)
        self.entropy_weight = entropy_weight
        self.self_label_share, self.confidence = self_label_share, confidence
        self.register_buffer("progress", torch.zeros(()))
        self.views = Crops({"view": recipe, **({"still": still(recipe)} if self_label_share else {})})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.partner is not None
        self_labelling = self.self_label_share > 0 and bool(self.progress >= 1.0 - self.self_label_share)
        other = batch["still"] if self_labelling else batch.partner["view"]
        features = self.backbone(torch.cat([batch["view"], other]))
        log_p, log_q = self.log_probs(features).chunk(2, dim=1)  # (H, B, K) each
        if self_labelling:
            losses = self_label_losses(log_p, log_q.detach(), self.confidence)
        else:
            losses = scan_losses(log_p, log_q, self.entropy_weight)
        return {"loss": losses.mean(), **representation_metrics(features)}

    def head_losses(self, batch: Batch) -> Tensor:
        assert batch.partner is not None
        log_p, log_q = (self.log_probs(self.backbone(part["view"])) for part in (batch, batch.partner))
        return scan_losses(log_p, log_q, self.entropy_weight)

    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)


@full_precision
def scan_losses(log_p: Tensor, log_q: Tensor, entropy_weight: float) -> Tensor:
    """(H,): log-probabilities (H, B, K) of samples and their neighbours on this rank; the mean p is of all ranks'."""
    consistency = -(log_p + log_q).logsumexp(dim=2).mean(dim=1)
    mean = gathered(log_p.exp().movedim(0, 1)).mean(dim=0)  # (H, K)
    return consistency + entropy_weight * (mean * safe_log(mean)).sum(dim=1)


@full_precision
def self_label_losses(log_p: Tensor, log_q: Tensor, confidence: float) -> Tensor:
    """(H,): cross-entropy of log_p (H, B, K) with the clusters of log_q (H, B, K) where these are confident.

    A sample weighs 1 / (how many of the global batch have its cluster), so that every cluster found weighs the same.
    """
    sure, labels = log_q.exp().max(dim=2)  # (H, B)
    chosen = F.one_hot(labels, log_q.shape[2]) * (sure >= confidence)[:, :, None]  # (H, B, K)
    counts = gathered(chosen.to(log_p.dtype).movedim(0, 1)).sum(dim=0)  # (H, K)
    weights = chosen / counts.clamp(min=1.0)[:, None]  # (H, B, K), of each cluster that was found: together 1
    found = (counts > 0).sum(dim=1).clamp(min=1)
    # the mean over ranks of what is returned is the sum over all samples
    return -(weights * log_p).sum(dim=(1, 2)) / found * world_size()
