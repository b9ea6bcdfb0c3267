"""Objectives that give cluster probabilities: H independent heads on one backbone, of which one is chosen.

Heads differ by where they begin alone, so they are restarts that share the cost of the backbone. Each is measured
on samples held still, without labels: its loss, and how well its clusters agree with those of the other heads. The
lowest loss is chosen; `outputs` are those of that head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.errors import UserError
from sslscale.models.collectives import all_reduce_mean, gather_rows
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, Objective
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom

NumClusters = Annotated[int, Field(ge=2)]
HeadInit = Literal["kmeans", "random"]


class Clustering(Objective):
    """H heads of K clusters. A subclass gives `log_probs` and `head_losses`."""

    further_outputs: ClassVar[tuple[str, ...]] = ("cluster_probs",)
    chosen: Tensor  # int64 scalar: the head whose clusters are given out

    def __init__(self, backbone: Backbone, recipe: AugmentConfig, num_clusters: int) -> None:
        super().__init__(backbone, recipe)
        self.num_clusters = num_clusters
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64))

    def log_probs(self, features: Tensor) -> Tensor:
        """(B, D) -> log p(cluster), (H, B, K), in float32 at least."""
        raise NotImplementedError

    def head_losses(self, batch: Batch) -> Tensor:
        """(H,) of a `held_out_batch`, by which a head is chosen."""
        raise NotImplementedError

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {"features": features, "cluster_probs": self.log_probs(features)[self.chosen].exp()}

    def prepares_at(self, moment: Moment) -> bool:
        return moment.step == 0

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        if self.num_clusters > corpus.num_samples:
            raise UserError(
                "more clusters than samples",
                got=f"num_clusters = {self.num_clusters}, n_samples = {corpus.num_samples}",
                allowed=f"2 to {corpus.num_samples}",
            )

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, random: KeyedRandom) -> dict[str, float]:
        """`held_out_loss` of the chosen head; `clusters_used` by it, exp of the entropy of their shares, and
        `largest_cluster`, the largest share; `agreement`, the mean AMI of its clusters and the other heads' (1: equal).
        """
        losses = all_reduce_mean(self.head_losses(self.held_out_batch(inputs, random)))
        self.chosen.copy_(losses.argmin())
        labels = gather_rows(self.log_probs(self.backbone(inputs)).argmax(dim=2).T.contiguous()).T.cpu()  # (H, n)
        best = int(self.chosen)
        shares = torch.bincount(labels[best], minlength=self.num_clusters) / labels.shape[1]
        measured = {
            "held_out_loss": float(losses[best]),
            "clusters_used": float(torch.special.entr(shares).sum().exp()),
            "largest_cluster": float(shares.max()),
        }
        others = [own for head, own in enumerate(labels) if head != best]
        if others:
            scores = [adjusted_mutual_info_score(labels[best].numpy(), other.numpy()) for other in others]
            measured["agreement"] = sum(scores) / len(scores)
        return measured


class LinearHeads(Clustering):
    """Heads that are linear in the features: p = softmax((W x + b) / temperature).

    By `init` "kmeans" they begin at the clusters of the features before the first step, each head at those of a seed of
    its own; by "random" at random weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        num_clusters: int,
        num_heads: int,
        init: HeadInit,
        temperature: AboveZero = 1.0,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters)
        self.num_heads, self.init, self.temperature = num_heads, init, temperature
        self.head = nn.Linear(backbone.feature_dim, num_heads * num_clusters)

    def log_probs(self, features: Tensor) -> Tensor:
        return split_heads(self.head(features) / self.temperature, self.num_heads)

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        super().prepare(corpus, moment)
        features = functools.cache(lambda: corpus.map(lambda images, _: self.backbone(images)))
        if moment.step == 0 and self.init == "kmeans":
            self._start(corpus, features())
        self.refresh(corpus, features)

    def refresh(self, corpus: Corpus, features: Callable[[], Tensor]) -> None:
        """What is found anew from time to time, from the corpus' features (n, D), which are computed when asked for."""

    @torch.no_grad()
    def _start(self, corpus: Corpus, features: Tensor) -> None:
        weights, biases = [], []
        for head in range(self.num_heads):
            weight, bias = nearest_centroid_logits(features, corpus.centroids(features, self.num_clusters, seed=head))
            weights.append(weight)
            biases.append(bias)
        self.head.weight.copy_(self.temperature * torch.cat(weights))
        self.head.bias.copy_(self.temperature * torch.cat(biases))


class NeighbourClustering(LinearHeads):
    """Learns from each sample and one of its nearest neighbours, which were found in the backbone's features.

    They are found before the first step, and again every `refresh_epochs` (0: never).
    """

    neighbours: Tensor  # int64 (N, k)

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        num_clusters: int,
        num_heads: int,
        init: HeadInit,
        num_neighbours: int,
        refresh_epochs: float,
        temperature: AboveZero = 1.0,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters, num_heads, init, temperature)
        self.num_neighbours, self.refresh_epochs = num_neighbours, refresh_epochs
        self.register_buffer("neighbours", torch.zeros(0, num_neighbours, dtype=torch.int64), persistent=False)

    def prepares_at(self, moment: Moment) -> bool:
        return moment.every(self.refresh_epochs)

    def refresh(self, corpus: Corpus, features: Callable[[], Tensor]) -> None:
        self.neighbours = corpus.by_id(corpus.neighbours(features(), self.num_neighbours))

    def partners(self, ids: Tensor, random: KeyedRandom) -> Tensor:
        return self.neighbours[ids, random.integers("neighbour", self.num_neighbours)]


def nearest_centroid_logits(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """W (K, D), b (K,) with softmax(W x + b) = softmax_k(-|x - c_k|^2 / s), of features (n, D) and centroids (K, D).

    s is the mean of |x - c|^2 to the nearest c, by which assignments are soft: training sharpens them. All is taken
    relative to the features' mean, which tells no cluster from another.
    """
    squared = torch.cdist(features.float(), centroids).amin(dim=1).square().mean()
    scale = squared if squared > 0 else squared.new_ones(())
    mean = features.float().mean(dim=0)
    away = centroids - mean
    return 2 * away / scale, -(away.square().sum(dim=1) + 2 * away @ mean) / scale


def safe_log(p: Tensor) -> Tensor:
    """log p, with a gradient that stays finite where a probability underflows to 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def split_heads(logits: Tensor, num_heads: int) -> Tensor:
    """(B, H K) -> log-probabilities (H, B, K), in float32 at least."""
    full = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return full.unflatten(1, (num_heads, -1)).movedim(1, 0).log_softmax(dim=2)
