"""A fixed set of geometric transformations, and views that were transformed by members of it drawn for the sample."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.views.image import augment
from sslscale.views.keyed import KeyedRandom

_QUARTER = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))  # cos and sin of k quarter turns


def transformations(flip: bool, shift: float) -> Tensor:
    """(T, 2, 3) affine maps of a square, from output to input coordinates in [-1, 1]; the first is the identity.

    All compositions of a flip (if asked for), a shift by 0 or +-`shift` of the side along each axis (if not 0), and a
    quarter turn, in that order: T = 72, 36, 8 or 4 (Golan & El-Yaniv 2018, section 3).
    """
    flips = (1.0, -1.0) if flip else (1.0,)
    shifts = (0.0, 2 * shift, -2 * shift) if shift else (0.0,)
    maps = []
    for sign, dx, dy, (cos, sin) in itertools.product(flips, shifts, shifts, _QUARTER):
        maps.append([[sign * cos, -sign * sin, -sign * dx], [sin, cos, -dy]])
    return torch.tensor(maps)


def transform(images: Tensor, maps: Tensor) -> Tensor:
    """(B, C, S, S) by (B, 2, 3), in one resampling; what comes from outside is the mirror image at the border."""
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


class Transformed:
    """`copies` views of each augmented image under different ones of the transformations `maps` (T, 2, 3).

    Gives `views` (B, copies, C, S, S) and `which` int64 (B, copies), their places in `maps`.
    """

    def __init__(self, recipe: AugmentConfig, maps: Tensor, copies: int) -> None:
        self.recipe, self.maps, self.copies = recipe, maps, copies

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        view = augment(images, random.fold("view"), self.recipe)
        which = random.permutation("which", len(self.maps))[:, : self.copies]
        maps = self.maps.to(view.device)[which.flatten()]
        made = transform(view.repeat_interleave(self.copies, dim=0), maps)
        return {"views": made.unflatten(0, (-1, self.copies)), "which": which}
