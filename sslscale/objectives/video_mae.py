"""VideoMAE (Tong et al. 2022, https://arxiv.org/abs/2203.12602): the pixels of masked tubes from the visible ones.

The same places are masked at every time (a tube), so that a patch cannot be copied from the frame before. The encoder
sees the visible tubelets only; a light decoder predicts the pixels x of the masked ones, each normalised by its own
mean and standard deviation:

    loss = mean over masked tubelets p of |decoder(encoder(visible))_p - (x_p - mean(x_p)) / std(x_p)|^2 / dim(x_p)

B clips, N tubelets (time before space), K visible, D width of the encoder, E of the decoder.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.image import take_tokens
from sslscale.models.video import VideoMAEBackbone
from sslscale.objectives.base import Objective, representation_metrics
from sslscale.objectives.mae import split_mask
from sslscale.views.base import Batch
from sslscale.views.video import Clip


class VideoMAE(Objective):
    """The pixels of masked tubes from the visible ones."""

    takes: ClassVar[str] = "clips"
    backbone: VideoMAEBackbone
    position: Tensor

    def __init__(
        self,
        backbone: VideoMAEBackbone,
        recipe: AugmentConfig,
        *,
        mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9,
        decoder_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        normalise_pixels: bool = True,
    ) -> None:
        super().__init__(backbone, recipe)
        if not isinstance(backbone, VideoMAEBackbone):
            raise UserError("video_mae needs the backbone library videomae", got=backbone.config.library)
        if recipe.size != backbone.config.size:
            raise UserError(
                "video_mae: views and backbone differ in size",
                got=f"views.size={recipe.size}, backbone.size={backbone.config.size}",
                fix="give both the same",
            )
        self.mask_ratio, self.normalise_pixels = mask_ratio, normalise_pixels
        tubelets = backbone.num_temporal * backbone.num_spatial
        self.embed = nn.Linear(backbone.feature_dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.register_buffer("position", sinusoids(tubelets, decoder_dim), persistent=False)  # (N, E)
        blocks = [Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)]
        pixels = backbone.config.channels * backbone.tubelet_size * backbone.patch_size**2
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, pixels))
        self.views = Clip(recipe)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clips, backbone = batch["view"], self.backbone
        noise = batch.random.uniform("mask", shape=(backbone.num_spatial,))
        keep, masked = (self._tubes(places) for places in split_mask(noise, self.mask_ratio))
        hidden = torch.ones(len(clips), len(self.position), dtype=torch.bool, device=clips.device)
        tokens = backbone.tokens(clips, hidden.scatter(1, keep, False))  # (B, K, D), in the order of `keep`
        predicted = take_tokens(self._decode(tokens, keep), masked)
        target = take_tokens(self.targets(clips), masked)
        return {
            "loss": (predicted.to(target.dtype) - target).square().mean(),
            **representation_metrics(tokens.mean(dim=1)),
        }

    def _tubes(self, places: Tensor) -> Tensor:
        """int64 (B, P) places -> the tubelets there at all times, ascending."""
        times = torch.arange(self.backbone.num_temporal, device=places.device) * self.backbone.num_spatial
        return (times[:, None] + places.sort(dim=1).values[:, None]).flatten(1)

    def _decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Encoded (B, K, D) of the tubelets `keep` -> predicted pixels of all (B, N, dim)."""
        visible = self.embed(tokens)
        x = self.mask_token.to(visible.dtype).expand(len(visible), len(self.position), -1)
        x = x.scatter(1, keep[:, :, None].expand_as(visible), visible)
        return self.decoder(x + self.position.to(visible.dtype))

    def targets(self, clips: Tensor) -> Tensor:
        """(B, T, C, H, W) -> the pixels of each tubelet (B, N, dim), normalised a tubelet."""
        pixels = tubelets(self.backbone.normalise(clips), self.backbone.tubelet_size, self.backbone.patch_size)
        if not self.normalise_pixels:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()


def tubelets(clips: Tensor, depth: int, side: int) -> Tensor:
    """(B, T, C, H, W) -> (B, N, depth side side C), time before rows before columns."""
    batch, frames, channels, height, width = clips.shape
    x = clips.reshape(batch, frames // depth, depth, channels, height // side, side, width // side, side)
    return x.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(batch, -1, depth * side * side * channels)


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sines and cosines of geometric frequencies (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(dim // 2) * 2 / dim)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
