"""IDEC, deep embedded clustering with a kept reconstruction (Guo et al. 2017, https://www.ijcai.org/proceedings/2017/243;
DEC: Xie et al. 2016, https://arxiv.org/abs/1511.06335).

z is a linear embedding of the backbone's features. Student's t gives soft assignments to K trained centres, and they
are drawn towards a sharper version of themselves, which is computed over the whole corpus now and then:

    q_ij = (1 + |z_i - m_j|^2 / a)^(-(a + 1) / 2) / sum_j'         p_ij = (q_ij^2 / f_j) / sum_j' ,  f_j = sum_i q_ij
    loss = reconstruction + gamma mean_i sum_j p_ij log(p_ij / q_ij)

The reconstruction, of the view from z, keeps the embedding from being bent at will. The embedding starts as the leading
principal directions of the features, the centres as their k-means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Positive
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.heads import image_decoder
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, full_precision, representation_metrics
from sslscale.objectives.clustering import Clustering, NumClusters, safe_log
from sslscale.objectives.subspace import principal_directions
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class StudentT(nn.Module):
    """(B, D) -> log q (B, K) for trained centres (K, D)."""

    def __init__(self, num_clusters: int, dim: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.centres = nn.Parameter(torch.randn(num_clusters, dim))

    def forward(self, z: Tensor) -> Tensor:
        return student_t(z, self.centres, self.alpha)


class IDEC(Clustering):
    """Improved deep embedded clustering."""

    targets: Tensor  # (N, K)

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_clusters: NumClusters,
        latent_dim: Positive = 10,
        gamma: float = 0.1,
        alpha: float = 1.0,
        refresh_epochs: float = 1.0,
        decoder_width: Positive = 64,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters)
        self.gamma, self.refresh_epochs = gamma, refresh_epochs
        self.embed = nn.Linear(backbone.feature_dim, latent_dim)
        self.assign = StudentT(num_clusters, latent_dim, alpha)
        self.decoder = image_decoder(latent_dim, backbone.config.channels, recipe.size, width=decoder_width)
        self.register_buffer("targets", torch.zeros(0, num_clusters), persistent=False)
        self.views = Crops({"view": recipe})

    def log_probs(self, features: Tensor) -> Tensor:
        return self.assign(self.embed(features))[None]

    def prepares_at(self, moment: Moment) -> bool:
        return moment.every(self.refresh_epochs)

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        super().prepare(corpus, moment)
        if moment.step == 0:
            self._start(corpus)
        q = corpus.map(lambda images, _: self.log_probs(self.backbone(images))[0].exp())
        self.targets = corpus.by_id(target_distribution(q))

    @torch.no_grad()
    def _start(self, corpus: Corpus) -> None:
        features = corpus.map(lambda images, _: self.backbone(images))
        mean, directions = principal_directions(features, len(self.embed.weight))
        self.embed.weight.copy_(directions)
        self.embed.bias.copy_(-directions @ mean)
        self.assign.centres.copy_(corpus.centroids(self.embed(features), self.num_clusters))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch["view"])
        z = self.embed(features)
        reconstruction = F.mse_loss(self.decoder(z), batch["view"])
        clustering = cluster_loss(self.targets[batch.ids], self.assign(z))
        loss = reconstruction + self.gamma * clustering
        return {
            "loss": loss,
            "reconstruction": reconstruction,
            "clustering": clustering,
            **representation_metrics(features),
        }

    def head_losses(self, batch: Batch) -> Tensor:
        """Held-out samples are drawn towards the targets that they would have among themselves."""
        features = self.backbone(batch["view"])
        z, log_q = self.embed(features), self.log_probs(features)[0]
        reconstruction = F.mse_loss(self.decoder(z), batch["view"])
        return (reconstruction + self.gamma * cluster_loss(self._own_targets(log_q), log_q))[None]

    @staticmethod
    def _own_targets(log_q: Tensor) -> Tensor:
        return target_distribution(log_q.exp(), all_reduce_mean(log_q.exp().mean(dim=0)))


@full_precision
def student_t(z: Tensor, centres: Tensor, alpha: float) -> Tensor:
    """log q (B, K) of z (B, D) and centres (K, D)."""
    squared = (z[:, None] - centres).square().sum(dim=2)
    return (-(alpha + 1.0) / 2.0 * torch.log1p(squared / alpha)).log_softmax(dim=1)


def target_distribution(q: Tensor, frequency: Tensor | None = None) -> Tensor:
    """p (n, K) of q (n, K); `frequency` (K,), up to a factor, where q is only a part of what it sums over."""
    weight = q.square() / (q.sum(dim=0) if frequency is None else frequency)
    return weight / weight.sum(dim=1, keepdim=True)


@full_precision
def cluster_loss(p: Tensor, log_q: Tensor) -> Tensor:
    """The mean over samples of KL(p || q); p: (B, K)."""
    return (p * (safe_log(p) - log_q)).sum(dim=1).mean()
