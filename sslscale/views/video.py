"""Views of clips (B, T, C, H, W) in [0, 1]; every draw is keyed by sample, and the same for all frames of a clip."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.views.image import augment
from sslscale.views.keyed import KeyedRandom


def augment_clip(clips: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
    """One view of each clip, its frames all cropped, coloured and blurred alike: (B, T, C, S, S)."""
    frames = clips.shape[1]
    alike = KeyedRandom(random.keys.repeat_interleave(frames))
    return augment(clips.flatten(0, 1), alike, recipe).unflatten(0, (len(clips), frames))


class Clip:
    """`view`: one augmented view of the clip."""

    def __init__(self, recipe: AugmentConfig) -> None:
        self.recipe = recipe

    def __call__(self, clips: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        return {"view": augment_clip(clips, random, self.recipe)}


class ShuffledPieces:
    """`view`: an augmented view of the clip, cut into `pieces` of equal length that are put into another order.

    `order` (B,) says which of the pieces! / 2 orders: one and its reverse are the same, as a clip that runs backwards
    is often as likely (Lee et al. 2017, https://arxiv.org/abs/1708.01246, section 3).
    """

    def __init__(self, recipe: AugmentConfig, pieces: int) -> None:
        self.recipe, self.pieces = recipe, pieces
        self.orders = [order for order in itertools.permutations(range(pieces)) if order[0] < order[-1]]

    def __call__(self, clips: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        if clips.shape[1] % self.pieces:
            raise UserError(
                "frame_order: the pieces do not divide the clip",
                got=f"objective.pieces={self.pieces}, {clips.shape[1]} frames",
                fix="set backbone.frames to a multiple of objective.pieces",
            )
        view = augment_clip(clips, random.fold("clip"), self.recipe)
        order = random.integers("order", len(self.orders))
        chosen = torch.tensor(self.orders, device=clips.device)[order]  # (B, pieces)
        backwards = random.flag("backwards", 0.5)[:, None]
        chosen = torch.where(backwards, chosen.flip(1), chosen)
        length = clips.shape[1] // self.pieces
        frames = (chosen[:, :, None] * length + torch.arange(length, device=clips.device)).flatten(1)  # (B, T)
        rows = torch.arange(len(clips), device=clips.device)[:, None]
        return {"view": view[rows, frames], "order": order}
