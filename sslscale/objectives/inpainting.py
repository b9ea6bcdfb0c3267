"""Inpainting, "context encoders" (Pathak et al. 2016, https://arxiv.org/abs/1604.07379).

Random cells M of a grid over the image x are painted over with the mean colour; from what is left, a decoder on the
backbone's pooled features f predicts the whole image, and is judged on what was hidden:

    loss = mean over pixels in M of (decoder(f(x outside M)) - x)^2,    x in units of the backbone's normalisation

This is the paper's reconstruction loss, without its adversarial one. It works on grey images as on coloured ones.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.models.heads import image_decoder
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops
from sslscale.views.keyed import KeyedRandom


class Inpainting(Objective):
    """The hidden regions of an image from the visible ones."""

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25,
        grid: Annotated[int, Field(ge=2)] = 4,
        decoder_width: int = 64,
    ) -> None:
        super().__init__(backbone, recipe)
        self.mask_ratio, self.grid = mask_ratio, grid
        self.decoder = image_decoder(backbone.feature_dim, backbone.config.channels, recipe.size, width=decoder_width)
        self.views = Crops({"view": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["view"]
        hidden = cell_mask(batch.random, self.grid, self.mask_ratio, images.shape[2])  # (B, 1, S, S)
        features = self.backbone(torch.where(hidden, self.backbone.mean.to(images.dtype), images))
        predicted = self.decoder(features)
        target = self.backbone.normalise(images)
        error = (predicted.to(target.dtype) - target).square().mean(dim=1, keepdim=True) * hidden
        loss = (error.sum(dim=(1, 2, 3)) / hidden.sum(dim=(1, 2, 3))).mean()
        return {"loss": loss, **representation_metrics(features)}


def cell_mask(random: KeyedRandom, grid: int, ratio: float, size: int) -> Tensor:
    """bool (B, 1, size, size): true on `ratio` of the cells of a grid x grid lattice, at least one, a draw a sample."""
    cells = random.permutation("mask", grid * grid) < max(1, math.floor(ratio * grid * grid))
    cell_of = torch.arange(size, device=cells.device) * grid // size
    return cells.view(-1, 1, grid, grid)[:, :, cell_of][:, :, :, cell_of]
