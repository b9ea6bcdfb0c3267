"""Masked autoencoder (He et al. 2021, https://arxiv.org/abs/2111.06377).

A ViT encodes the few patches that stay visible; a light decoder, given those and one shared mask token for every other
patch, predicts the pixels x of the masked set M, each patch normalised by its own mean and standard deviation:

    loss = mean over patches p in M of |decoder(encoder(visible))_p - (x_p - mean(x_p)) / std(x_p)|^2 / dim(x_p)

Which output of timm's ViT is the feature is the backbone's own choice: `kwargs: {global_pool: token}` or `avg`.

B batch, N patches, K visible, P prefix tokens (class, registers), D width of the encoder, E of the decoder.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.image import Backbone, take_tokens
from sslscale.objectives.base import Objective, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops
from sslscale.views.keyed import KeyedRandom


class MAE(Objective):
    """The pixels of masked patches from the visible ones; the encoder never sees a masked patch."""

    backbone: Backbone
    position: Tensor

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75,
        decoder_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise_pixels: bool = True,
    ) -> None:
        super().__init__(backbone, recipe)
        vit = backbone.vit
        if vit.global_pool == "map":
            raise UserError("mae trains no attention pooling", got="global_pool=map", allowed="token, avg, max")
        self.patch_size, grid = vit.patch_embed.patch_size[0], vit.patch_embed.grid_size
        if tuple(side * self.patch_size for side in grid) != (recipe.size, recipe.size):
            raise UserError(
                "mae: the ViT's patches do not tile the view",
                got=f"{grid[0]} x {grid[1]} patches of {self.patch_size}, views.size={recipe.size}",
                fix=f"set backbone.kwargs.img_size={recipe.size} and a patch_size that divides it",
            )
        self.num_patches, self.num_prefix = vit.patch_embed.num_patches, vit.num_prefix_tokens
        self.mask_ratio, self.normalise_pixels = mask_ratio, normalise_pixels
        self.embed = nn.Linear(backbone.feature_dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.register_buffer("position", build_sincos2d_pos_embed(list(grid), decoder_dim), persistent=False)  # (N, E)
        blocks = [Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)]
        pixels = backbone.config.channels * self.patch_size**2
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, pixels))
        self.views = Crops({"view": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["view"]
        keep, masked = random_mask(batch.random, self.num_patches, self.mask_ratio)
        tokens = self.backbone.tokens(images, keep)  # (B, P + K, D)
        predicted = take_tokens(self.decode(tokens, keep), masked)
        target = take_tokens(self.targets(images), masked)
        features = tokens[:, self.num_prefix :].mean(dim=1)
        return {"loss": (predicted.to(target.dtype) - target).square().mean(), **representation_metrics(features)}

    def decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Encoded (B, P + K, D) of the patches `keep` -> predicted pixels of all (B, N, C p^2)."""
        x = self.embed(tokens)
        prefix, visible = x[:, : self.num_prefix], x[:, self.num_prefix :]
        patches = self.mask_token.to(x.dtype).expand(len(x), self.num_patches, -1)
        patches = patches.scatter(1, keep[:, :, None].expand_as(visible), visible) + self.position.to(x.dtype)
        return self.decoder(torch.cat([prefix, patches], dim=1))[:, self.num_prefix :]

    def targets(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the pixels of each patch (B, N, C p^2), normalised a patch."""
        pixels = patchify(self.backbone.normalise(images), self.patch_size)
        if not self.normalise_pixels:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()


def random_mask(random: KeyedRandom, num_patches: int, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """int64 (B, K) visible and (B, N - K) masked patches, K = max(1, floor(N (1 - ratio)))."""
    return split_mask(random.uniform("mask", shape=(num_patches,)), mask_ratio)


def split_mask(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Noise (B, N): the patches with the least stay visible (the authors' code, random_masking)."""
    order = noise.argsort(dim=1, stable=True)
    visible = max(1, int(noise.shape[1] * (1 - mask_ratio)))
    return order[:, :visible], order[:, visible:]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p p C), row by row, channels last within a patch."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)
