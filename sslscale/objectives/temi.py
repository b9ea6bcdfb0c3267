"""TEMI (Adaloglou et al. 2023, https://arxiv.org/abs/2303.17896).

A student and a teacher (an exponential moving average) give cluster probabilities q_s and q_t of a sample x and one of
its nearest neighbours x'. The pointwise mutual information of their clusters is maximised, the more the teacher's
heads agree that the two belong together:

    pmi(x, x') = log sum_c (q_s(c|x) q_t(c|x'))^beta / q_t(c)
    w(x, x') = mean over heads of sum_c q_t(c|x) q_t(c|x')
    loss = -w (pmi(x, x') + pmi(x', x)) / 2

q_t(c), the teacher's marginal, is a moving average over batches. beta < 1 keeps clusters from dying.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.config.models import Fraction, Positive
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, full_precision, representation_metrics
from sslscale.objectives.clustering import HeadInit, NeighbourClustering, NumClusters, safe_log, split_heads
from sslscale.objectives.teacher import Teacher, TeacherObjective
from sslscale.views.base import Batch
from sslscale.views.crops import Crops


class TEMI(NeighbourClustering, TeacherObjective):
    """Self-distilled clusters of neighbours, by weighted pointwise mutual information."""

    log_marginal: Tensor  # (H, K)

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_clusters: NumClusters,
        num_heads: Positive = 16,
        init: HeadInit = "kmeans",
        num_neighbours: Positive = 50,
        refresh_epochs: float = 0.0,
        beta: Fraction = 0.6,
        temperature: AboveZero = 0.1,
        momentum: Fraction = 0.996,
        marginal_momentum: Fraction = 0.9,
    ) -> None:
        super().__init__(backbone, recipe, num_clusters, num_heads, init, num_neighbours, refresh_epochs, temperature)
        self.beta, self.marginal_momentum = beta, marginal_momentum
        self.teacher = Teacher(self.backbone, self.head, momentum=momentum)
        self.register_buffer("log_marginal", torch.full((num_heads, num_clusters), -math.log(num_clusters)))
        self.views = Crops({"view": recipe})
        self._marginals: list[Tensor] = []  # (H, K) of each pass of the present step

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        super().prepare(corpus, moment)
        if moment.step == 0:
            self.teacher.follow()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.partner is not None
        images = torch.cat([batch["view"], batch.partner["view"]])
        features = self.backbone(images)
        student = self.log_probs(features)  # (H, 2 B, K)
        teacher = split_heads(self.teacher(images) / self.temperature, self.num_heads)
        self._marginals.append(teacher.exp().mean(dim=1))
        (s, s_other), (t, t_other) = student.chunk(2, dim=1), teacher.chunk(2, dim=1)
        losses = temi_losses(s, s_other, t, t_other, self.log_marginal, self.beta)
        return {"loss": losses.mean(), **representation_metrics(features)}

    def head_losses(self, batch: Batch) -> Tensor:
        """The student in the teacher's place: a teacher that looks on would count in its statistics."""
        assert batch.partner is not None
        log_p, log_q = (self.log_probs(self.backbone(part["view"])) for part in (batch, batch.partner))
        return temi_losses(log_p, log_q, log_p, log_q, self.log_marginal, self.beta)

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        mean = all_reduce_mean(torch.stack(self._marginals).mean(dim=0))
        marginal = self.log_marginal.exp()
        # a pass whose step was skipped counts too, but not what overflowed in it
        marginal = marginal.lerp(torch.where(mean.isfinite(), mean, marginal), 1.0 - self.marginal_momentum)
        self.log_marginal.copy_(safe_log(marginal))
        self._marginals.clear()


@full_precision
def temi_losses(
    student: Tensor, student_other: Tensor, teacher: Tensor, teacher_other: Tensor, log_marginal: Tensor, beta: float
) -> Tensor:
    """(H,): log-probabilities (H, B, K) of samples and of their neighbours; log q_t(c) (H, K)."""
    weight = (teacher + teacher_other).exp().sum(dim=2).mean(dim=0)  # (B,)

    def pmi(a: Tensor, b: Tensor) -> Tensor:
        return (beta * (a + b) - log_marginal[:, None]).logsumexp(dim=2)  # (H, B)

    return -(weight * (pmi(student, teacher_other) + pmi(student_other, teacher)) / 2).mean(dim=1)
