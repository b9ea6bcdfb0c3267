"""A mixture of pretext experts: clusters are what makes a self-supervised task easy.

The task: from a masked view x, predict the feature y_t of another view t of the same image, by one of K experts

    p(y_t | x, z = k) = N(y_t; m_k + V_k b(x), diag(s^2)),        b a linear bottleneck of a few units

on frozen features, y_t being a principal projection of them at unit length. Assignments and experts minimise together,
over the corpus,

    sum_ik q_ik (l_ik + e log q_ik),    l_ik = mean over tasks of -log p(y_t | x_i, z = k)

with rows of Q summing to 1 and columns drawn to N times the prior; that balance is annealed to none, which leaves a
mixture's posterior with temperature e. Three rules make the result mean something: experts are too weak to do without
z; z is found from one half of the tasks and scored on the other half, on held-out samples, against a single expert of
as many parameters; and the prior (uniform) is declared. `bits_saved` a task is the difference of the two in bits.
Precedents: MiCE (https://arxiv.org/abs/2105.01899), SeLa (https://arxiv.org/abs/1911.05371).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.config.models import Fraction, Positive
from sslscale.models.collectives import gather_rows
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, full_precision, representation_metrics
from sslscale.objectives.clustering import Clustering, NumClusters
from sslscale.objectives.subspace import principal_directions
from sslscale.objectives.transport import transport
from sslscale.views.base import Batch
from sslscale.views.crops import Crops
from sslscale.views.keyed import KeyedRandom

LEAST_STD = 0.05  # that experts start with, where the average over a target's coordinates is 1
COLLAPSED = 1.5  # clusters used, below which there is but one


class Mixtures(nn.Module):
    """H mixtures of K experts: features of masked views (B, D) -> means (H, B, K, Y)."""

    def __init__(self, num_heads: int, num_clusters: int, feature_dim: int, target_dim: int, rank: int) -> None:
        super().__init__()
        self.bottleneck = nn.Linear(feature_dim, num_heads * rank, bias=False)
        self.means = nn.Parameter(torch.randn(num_heads, num_clusters, target_dim))
        self.directions = nn.Parameter(torch.zeros(num_heads, num_clusters, rank, target_dim))
        self.log_std = nn.Parameter(torch.zeros(num_heads, target_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.bottleneck(x).unflatten(1, (len(self.means), -1))  # (B, H, r)
        moved = torch.einsum("bhr,hkry->hbky", b, self.directions)
        return self.means[:, None] + moved, self.log_std


class Single(nn.Module):
    """One expert with a wider bottleneck: features of masked views (B, D) -> means (1, B, 1, Y)."""

    def __init__(self, feature_dim: int, target_dim: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(feature_dim, rank, bias=False), nn.Linear(rank, target_dim))
        self.log_std = nn.Parameter(torch.zeros(1, target_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x)[None, :, None], self.log_std


class Experts(Clustering):
    """Clusters that make the features of other views predictable. The backbone is not trained."""

    assignments: Tensor  # (N, H, K)
    mean: Tensor  # (D,)
    directions: Tensor  # (Y, D)

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_clusters: NumClusters,
        num_heads: Positive = 4,
        tasks: Positive = 2,
        target_dim: Positive = 32,
        rank: Positive = 2,
        temperature: AboveZero = 1.0,
        balanced_share: Fraction = 0.5,
        refresh_epochs: float = 1.0,
        mask_scale: tuple[Fraction, Fraction] = (0.4, 0.6),
    ) -> None:
        """`tasks` views infer the assignment, and as many score it; balance falls from 1 to 0 over `balanced_share`."""
        super().__init__(backbone, recipe, num_clusters)
        backbone.freeze()
        self.tasks, self.temperature = tasks, temperature
        self.balanced_share, self.refresh_epochs = balanced_share, refresh_epochs
        dim = backbone.feature_dim
        self.mixtures = Mixtures(num_heads, num_clusters, dim, target_dim, rank)
        own = num_clusters * target_dim * (1 + rank) + dim * rank
        self.single = Single(dim, target_dim, max(1, round(own / (dim + target_dim))))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("directions", torch.zeros(target_dim, dim))
        self.register_buffer("assignments", torch.zeros(0, num_heads, num_clusters), persistent=False)
        masked = recipe.model_copy(update={"erase": 1.0, "erase_scale": mask_scale})
        self.views = Crops({"masked": masked, **{f"target_{task}": recipe for task in range(2 * tasks)}})

    def _targets(self, features: Tensor) -> Tensor:
        return (F.normalize(features, dim=-1) - self.mean) @ self.directions.T

    def _of_views(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features (B, D) of the masked view, and targets (B, 2 tasks, Y)."""
        features = self.backbone(torch.cat(list(views.values()))).unflatten(0, (len(views), -1))
        return features[0], self._targets(features[1:].movedim(0, 1))

    def log_probs(self, features: Tensor) -> Tensor:
        """Of a whole image, which is its own target."""
        losses = gaussian_nll(self._targets(features)[:, None], *self.mixtures(features))
        return posterior(losses, self.temperature)

    def prepares_at(self, moment: Moment) -> bool:
        return moment.every(self.refresh_epochs)

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        super().prepare(corpus, moment)
        if moment.step == 0:
            self._start(corpus)
        losses = corpus.map(
            lambda images, random: self._inferring(self.make_views(images, random.fold("views"))).movedim(0, 1)
        ).movedim(1, 0)  # (H, n, K)
        uniform = losses.new_full((self.num_clusters,), -math.log(self.num_clusters), dtype=torch.float64)
        progress = moment.step / moment.last_step
        balance = max(0.0, 1.0 - progress / self.balanced_share) if self.balanced_share else 0.0
        log_q = transport(-losses.double() / self.temperature + uniform, uniform, balance)
        self.assignments = corpus.by_id(log_q.exp().to(losses.dtype).movedim(0, 1))

    def _inferring(self, views: dict[str, Tensor]) -> Tensor:
        """(H, B, K): the mean loss of each expert over the first half of the tasks."""
        x, y = self._of_views(views)
        return gaussian_nll(y[:, : self.tasks], *self.mixtures(x)).mean(dim=3)

    @torch.no_grad()
    def _start(self, corpus: Corpus) -> None:
        features = corpus.map(lambda images, _: self.backbone(images))
        mean, directions = principal_directions(F.normalize(features, dim=1), len(self.directions))
        self.mean.copy_(mean)
        self.directions.copy_(directions)
        targets = self._targets(features)
        self.single.log_std.copy_(targets.std(dim=0).clamp(min=LEAST_STD).log())
        for head, means in enumerate(self.mixtures.means):
            means.copy_(corpus.centroids(targets, self.num_clusters, seed=head))
            left = targets - means[torch.cdist(targets, means).argmin(dim=1)]
            self.mixtures.log_std[head] = left.std(dim=0).clamp(min=LEAST_STD).log()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x, y = self._of_views(batch.views)
        losses = gaussian_nll(y, *self.mixtures(x)).mean(dim=3)  # (H, B, K)
        q = self.assignments[batch.ids].movedim(1, 0)
        mixture = expert_losses(losses, q, self.temperature)
        single = gaussian_nll(y, *self.single(x)).mean()
        return {
            "loss": mixture.mean() + single,
            "mixture": mixture.mean(),
            "single": single,
            **representation_metrics(x),
        }

    def head_losses(self, batch: Batch) -> Tensor:
        return self._scored(batch)[0].mean(dim=1)

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A task's loss on the second half of the tasks: of the mixtures (H, B), z from the first half; of one (B,)."""
        x, y = self._of_views(batch.views)
        mixture = scored_losses(gaussian_nll(y, *self.mixtures(x)), self.tasks, self.temperature)
        single = gaussian_nll(y[:, self.tasks :], *self.single(x)).mean(dim=(0, 2, 3))
        return mixture, single

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, random: KeyedRandom) -> dict[str, float]:
        """Beside what every clustering measures: `bits_saved` a task, with the ends of its 95% interval, and whether
        the chosen head has `collapsed` to one cluster (1) or not (0).
        """
        measured = super().evaluate(inputs, random)
        mixture, single = self._scored(self.held_out_batch(inputs, random))
        bits = gather_rows((single - mixture[self.chosen]) / math.log(2)).double()
        half = 1.96 * float(bits.std()) / len(bits) ** 0.5
        saved = float(bits.mean())
        interval = {"bits_saved": saved, "bits_saved_low": saved - half, "bits_saved_high": saved + half}
        return {**measured, **interval, "collapsed": float(measured["clusters_used"] < COLLAPSED)}


@full_precision
def gaussian_nll(y: Tensor, means: Tensor, log_std: Tensor) -> Tensor:
    """(H, B, K, T): -log N(y; means, diag(std^2)) of targets y (B, T, Y), means (H, B, K, Y), log_std (H, Y)."""
    log_std = log_std[:, None, None, None]
    standard = (y[None, :, None] - means[:, :, :, None]) * (-log_std).exp()
    return (0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=4)


def posterior(losses: Tensor, temperature: float) -> Tensor:
    """log q (H, B, K) by losses (H, B, K, T) of the tasks, under the uniform prior and no balance."""
    return (-losses.mean(dim=3) / temperature).log_softmax(dim=2)


def scored_losses(losses: Tensor, inferring: int, temperature: float) -> Tensor:
    """(H, B): what a task after the first `inferring` costs, -log sum_k q_k prod_t p(y_t | k) / T', q from the first.

    losses: (H, B, K, T), -log p(y_t | k).
    """
    log_q, scoring = posterior(losses[..., :inferring], temperature), losses[..., inferring:]
    return -(log_q - scoring.sum(dim=3)).logsumexp(dim=2) / scoring.shape[3]


def expert_losses(losses: Tensor, q: Tensor, temperature: float) -> Tensor:
    """(H,): mean over samples of sum_k q_k (l_k + e log q_k), of losses and q (H, B, K)."""
    return (q * losses + temperature * torch.xlogy(q, q)).sum(dim=2).mean(dim=1)
