"""Jigsaw puzzles (Noroozi and Favaro 2016, https://arxiv.org/abs/1603.09246).

The nine patches of a 3 x 3 grid, shuffled by one permutation of a fixed set, go through the same backbone one by one; a
head on their features, side by side, says which permutation it was:

    loss = -log p(permutation | f(patch_1), ..., f(patch_9))
"""

from __future__ import annotations

import functools
import itertools
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.models.heads import mlp
from sslscale.models.image import Backbone
from sslscale.objectives.base import PatchObjective, classification_metrics, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.pretext import ShuffledPatches


class Jigsaw(PatchObjective):
    """Which permutation shuffled the patches of an image."""

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        patch_size: int = 64,
        gap: int = 0,
        num_permutations: Annotated[int, Field(ge=2, le=10_000)] = 1000,
        hidden_dim: int = 4096,
    ) -> None:
        super().__init__(backbone, recipe)
        self.head = mlp(9 * backbone.feature_dim, hidden_dim, num_permutations)
        self.views = ShuffledPatches(recipe, patch_size, gap, distant_permutations(num_permutations))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        patches = batch["patches"].transpose(0, 1).flatten(0, 1)  # (9 B, C, p, p), the first of every image first
        features = self.backbone(self.equalise(patches))  # (9 B, D)
        logits = self.head(features.unflatten(0, (9, -1)).transpose(0, 1).flatten(1))  # (B, num_permutations)
        return {
            "loss": F.cross_entropy(logits, batch["permutation"]),
            **classification_metrics(logits, batch["permutation"]),
            **representation_metrics(features),
        }

    def equalise(self, patches: Tensor) -> Tensor:
        """Gives every patch and channel the mean and deviation that the backbone expects of images.

        Else a gradient of the light across the image would solve the task (section 4.2).
        """
        deviation, mean = torch.std_mean(patches, dim=(2, 3), keepdim=True)
        return self.backbone.mean + self.backbone.std * (patches - mean) / deviation.clamp(min=1 / 255)


@functools.cache
def distant_permutations(count: int) -> tuple[tuple[int, ...], ...]:
    """`count` permutations of nine, far from each other in Hamming distance (section 4.2), always the same.

    Greedy: from the identity on, the next is the first in lexicographic order that is farthest from its nearest chosen
    one. The paper takes the largest sum of distances, which lets two of them nearly coincide.
    """
    columns = np.array(list(itertools.permutations(range(9))), dtype=np.int8).T.copy()  # (9, 9!)
    nearest = np.full(columns.shape[1], 9, dtype=np.int8)
    chosen = [0]
    while len(chosen) < count:
        distance = np.zeros_like(nearest)
        for column in columns:
            distance += column != column[chosen[-1]]
        np.minimum(nearest, distance, out=nearest)
        chosen.append(int(nearest.argmax()))
    return tuple(map(tuple, columns[:, chosen].T.tolist()))
