"""Several augmented views of the same image, of one or several sizes, for joint-embedding objectives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.views.image import augment
from sslscale.views.keyed import KeyedRandom


class Crops:
    """`Crops({"view_1": recipe, "view_2": recipe})`: one independent view a name, by its own recipe and size."""

    def __init__(self, recipes: Mapping[str, AugmentConfig]) -> None:
        self.recipes = dict(recipes)

    def __call__(self, images: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        return {name: augment(images, random.fold(name), recipe) for name, recipe in self.recipes.items()}


def multi_crop(
    recipe: AugmentConfig, local_crops: int, local_size: int | None, local_scale: tuple[float, float]
) -> Crops:
    """Two global views by `recipe`, then `local_crops` small ones of a small part of the image (SwAV, section 3.3).

    local_size: none for 3/7 of the recipe's, the papers' 96 of 224. local_scale: share of the area that they keep.
    """
    size = local_size or max(1, recipe.size * 3 // 7)
    local = recipe.model_copy(update={"size": size, "crop_scale": local_scale})
    return Crops({"global_1": recipe, "global_2": recipe} | {f"local_{i}": local for i in range(1, local_crops + 1)})


def still(recipe: AugmentConfig) -> AugmentConfig:
    """The recipe of a view of the same size that shows the whole image as it is."""
    return AugmentConfig(size=recipe.size, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
