"""DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

The student predicts, from every view of an image, the teacher's distribution over K outputs for each other global view:

    loss = mean over g, v != g of  -sum_k softmax((t_g - c) / tau_t)_k log softmax(s_v / tau_s)_k

with s and t the outputs of student and teacher. The centre c, a moving average of the teacher's mean output, keeps one
output from winning; the low temperature tau_t keeps the distribution from going flat. The teacher is an exponential
moving average of backbone and head, and sees global views only.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.base import AboveZero
from sslscale.config.models import Fraction, Positive
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.heads import Prototypes
from sslscale.models.image import Backbone
from sslscale.objectives.base import (
    by_resolution,
    check_local_size,
    full_precision,
    representation_metrics,
    swapped_cross_entropy,
)
from sslscale.objectives.teacher import Teacher, TeacherObjective
from sslscale.views.base import Batch
from sslscale.views.crops import Crops, multi_crop


class DINO(TeacherObjective):
    """Self-distillation with no labels, over global and local views."""

    views: Crops
    centre: Tensor  # (K,)
    progress: Tensor

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        num_prototypes: Positive = 65536,
        student_temperature: AboveZero = 0.1,
        teacher_temperature: AboveZero = 0.07,
        warmup_teacher_temperature: AboveZero = 0.04,
        warmup_share: Fraction = 0.3,
        momentum: Fraction = 0.996,
        centre_momentum: Fraction = 0.9,
        freeze_share: Fraction = 0.01,
        local_crops: Annotated[int, Field(ge=0)] = 8,
        local_size: Positive | None = None,
        local_scale: tuple[Fraction, Fraction] = (0.05, 0.4),
        hidden_dim: int = 2048,
        output_dim: int = 256,
    ) -> None:
        super().__init__(backbone, recipe)
        self.student_temperature, self.centre_momentum = student_temperature, centre_momentum
        self.teacher_temperatures, self.warmup_share = (warmup_teacher_temperature, teacher_temperature), warmup_share
        prototypes = Prototypes(output_dim, num_prototypes)
        self.head = nn.Sequential(
            nn.Linear(backbone.feature_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, output_dim),
            prototypes,
        )
        self.teacher = Teacher(self.backbone, self.head, momentum=momentum)
        # the output layer waits for features (the authors' code: for the first epoch)
        prototypes.weight.register_hook(lambda gradient: gradient * (self.progress >= freeze_share))
        self.register_buffer("centre", torch.zeros(num_prototypes))
        self.register_buffer("progress", torch.zeros(()))
        self.views = multi_crop(recipe, local_crops, local_size, local_scale)
        if local_crops:
            check_local_size(backbone, self.views.recipes["local_1"].size)
        self._means: list[Tensor] = []  # (K,) of the teacher's outputs in each pass of the present step

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views = [batch[name] for name in self.views.recipes]
        features = by_resolution(self.backbone, views)  # (V B, D)
        student = self.head(features).unflatten(0, (len(views), -1))  # (V, B, K)
        teacher = self.teacher(torch.cat(views[:2])).unflatten(0, (2, -1))  # (2, B, K)
        self._means.append(teacher.mean(dim=(0, 1)))
        loss = dino_loss(student, teacher, self.centre, self._temperature(), self.student_temperature)
        return {"loss": loss, **representation_metrics(features)}

    def _temperature(self) -> Tensor:
        """The teacher's: linear from the first to the second of `teacher_temperatures` over the warm-up."""
        start, end = self.teacher_temperatures
        return start + (end - start) * (self.progress / max(self.warmup_share, 1e-9)).clamp(max=1.0)

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        mean = all_reduce_mean(torch.stack(self._means).mean(dim=0))
        # a pass whose step was skipped counts too, but not what overflowed in it
        self.centre.lerp_(torch.where(mean.isfinite(), mean, self.centre), 1.0 - self.centre_momentum)
        self._means.clear()
        self.progress.fill_(progress)


@full_precision
def dino_loss(
    student: Tensor, teacher: Tensor, centre: Tensor, teacher_temperature: Tensor | float, student_temperature: float
) -> Tensor:
    """student: outputs (V, B, K); teacher: outputs (G, B, K) of the first G of those views; centre: (K,)."""
    targets = ((teacher - centre) / teacher_temperature).softmax(dim=-1)
    return swapped_cross_entropy(targets, student / student_temperature)
