"""Views that carry a pretext task's target: a patch's position, a permutation, a rotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.views.image import augment, crop_at, jitter, rotate_quarter
from sslscale.views.keyed import KeyedRandom

# The eight cells around the centre of a 3 x 3 grid, row by row.
NEIGHBOUR_CELLS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))

_ONLY_GEOMETRY = {"jitter_probability": 0.0, "grayscale": 0.0, "erase": 0.0}


class _Grid:
    """A 3 x 3 grid of patches, `patch_size` wide in cells of a third of the view.

    Patches are moved within their cells at random, and at least `gap` pixels lie between two: continuing an edge or a
    texture does not solve the task (Doersch et al. 2015, section 3.1). Each patch's colours are jittered on their own,
    against chromatic aberration, and the whole's are not.
    """

    def __init__(self, recipe: AugmentConfig, patch_size: int, gap: int) -> None:
        self.recipe, self.patch_size, self.gap = recipe, patch_size, gap
        self.cell = recipe.size // 3
        if patch_size + gap > self.cell:
            raise UserError(
                "patches do not fit into a 3 x 3 grid",
                got=f"objective.patch_size={patch_size}, objective.gap={gap}, views.size={recipe.size}",
                allowed=f"patch_size + gap <= views.size // 3 = {self.cell}",
            )

    def whole(self, images: Tensor, random: KeyedRandom) -> Tensor:
        return augment(images, random.fold("whole"), self.recipe.model_copy(update=_ONLY_GEOMETRY))

    def patch(self, whole: Tensor, random: KeyedRandom, cells: Tensor) -> Tensor:
        """The patch in `cells` (B, 2), row and column: (B, C, patch_size, patch_size)."""
        slack = self.cell - self.gap - self.patch_size + 1
        corner = cells * self.cell + self.gap // 2 + random.integers("corner", slack, shape=(2,))
        return jitter(crop_at(whole, corner[:, 0], corner[:, 1], self.patch_size), random, self.recipe)


class PatchPair(_Grid):
    """The centre patch of a 3 x 3 grid and one of its eight neighbours.

    Gives `centre`, `neighbour` (B, C, patch_size, patch_size) and `position` int64 (B,) in [0, 8).
    """

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        whole = self.whole(images, random)
        position = random.integers("position", len(NEIGHBOUR_CELLS))
        cells = torch.tensor(NEIGHBOUR_CELLS, device=images.device)[position]  # (B, 2)
        return {
            "centre": self.patch(whole, random.fold("centre"), torch.ones_like(cells)),
            "neighbour": self.patch(whole, random.fold("neighbour"), cells),
            "position": position,
        }


class ShuffledPatches(_Grid):
    """All nine patches of a 3 x 3 grid, shuffled by one of `permutations`.

    Gives `patches` (B, 9, C, patch_size, patch_size), of which the i-th lay in the cell permutation[i], and
    `permutation` int64 (B,), its place in `permutations`.
    """

    def __init__(self, recipe: AugmentConfig, patch_size: int, gap: int, permutations: Sequence[Sequence[int]]) -> None:
        super().__init__(recipe, patch_size, gap)
        self.permutations = permutations

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        whole = self.whole(images, random)
        permutation = random.integers("permutation", len(self.permutations))
        order = torch.tensor(self.permutations, device=images.device)[permutation]  # (B, 9)
        patches = [
            self.patch(whole, random.fold(f"patch_{i}"), torch.stack([cell // 3, cell % 3], dim=1))
            for i, cell in enumerate(order.unbind(dim=1))
        ]
        return {"patches": torch.stack(patches, dim=1), "permutation": permutation}


class Rotated:
    """An augmented view turned by a quarter turn drawn for the sample: `view` (B, C, S, S), `turns` int64 (B,)."""

    def __init__(self, recipe: AugmentConfig) -> None:
        self.recipe = recipe

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        turns = random.integers("turns", 4)
        return {"view": rotate_quarter(augment(images, random.fold("view"), self.recipe), turns), "turns": turns}
