"""Views that carry a pretext task's target: a patch's position, a rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.views.image import augment, crop_at, jitter, rotate_quarter
from sslscale.views.keyed import KeyedRandom

# The eight cells around the centre of a 3 x 3 grid, row by row.
NEIGHBOUR_CELLS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))


class PatchPair:
    """The centre patch of a 3 x 3 grid and one of its eight neighbours.

    Patches are `patch_size` wide in cells of a third of the view. Each is moved within its cell at random, and so at
    least `gap` pixels lie between two patches: continuing an edge or a texture does not solve the task (Doersch et al.
    2015, section 3.1). Each patch's colours are jittered on their own, against chromatic aberration.
    Gives `centre`, `neighbour` (B, C, patch_size, patch_size) and `position` int64 (B,) in [0, 8).
    """

    def __init__(self, recipe: AugmentConfig, patch_size: int, gap: int) -> None:
        self.recipe, self.patch_size, self.gap = recipe, patch_size, gap
        self.cell = recipe.size // 3
        if patch_size + gap > self.cell:
            raise UserError(
                "context_prediction: patches do not fit into a 3 x 3 grid",
                got=f"patch_size={patch_size}, gap={gap}, views.size={recipe.size}",
                allowed=f"patch_size + gap <= views.size // 3 = {self.cell}",
            )

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        whole = augment(images, random.fold("whole"), self.recipe.model_copy(update={"erase": 0.0}))
        position = random.integers("position", len(NEIGHBOUR_CELLS))
        cells = torch.tensor(NEIGHBOUR_CELLS, device=images.device)[position]  # (B, 2)
        return {
            "centre": self._patch(whole, random.fold("centre"), torch.ones_like(cells)),
            "neighbour": self._patch(whole, random.fold("neighbour"), cells),
            "position": position,
        }

    def _patch(self, whole: Tensor, random: KeyedRandom, cells: Tensor) -> Tensor:
        slack = self.cell - self.gap - self.patch_size + 1
        corner = cells * self.cell + self.gap // 2 + random.integers("jitter", slack, shape=(2,))
        return jitter(crop_at(whole, corner[:, 0], corner[:, 1], self.patch_size), random, self.recipe)


class Rotated:
    """An augmented view turned by a quarter turn drawn for the sample: `view` (B, C, S, S), `turns` int64 (B,)."""

    def __init__(self, recipe: AugmentConfig) -> None:
        self.recipe = recipe

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        turns = random.integers("turns", 4)
        return {"view": rotate_quarter(augment(images, random.fold("view"), self.recipe), turns), "turns": turns}
