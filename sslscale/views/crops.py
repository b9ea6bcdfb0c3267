"""Several augmented views of the same image, for joint-embedding objectives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.views.image import augment
from sslscale.views.keyed import KeyedRandom


class Crops:
    """`Crops({"view_1": recipe, "view_2": recipe})`: one independent view a name."""

    def __init__(self, recipes: Mapping[str, AugmentConfig]) -> None:
        self.recipes = dict(recipes)

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        return {name: augment(images, random.fold(name), recipe) for name, recipe in self.recipes.items()}
