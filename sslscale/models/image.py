"""Image backbones: any timm model by name and arguments, exported to a folder that plain timm loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.layers import DropPath
from timm.models import VisionTransformer, checkpoint_seq
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sslscale.config import AugmentConfig, BackboneConfig, FramesConfig
from sslscale.errors import UserError, did_you_mean
from sslscale.models.base import Encoder
from sslscale.models.drop_path import key_drops
from sslscale.shards.readers import ImageReader, Reader
from sslscale.views.image import augment
from sslscale.views.keyed import KeyedRandom

_LAYER = re.compile(r"layer:([1-9]\d*)")

# What backbone.json tells a reader who has timm and nothing of ours.
_LOAD = (
    "model = timm.create_model(meta['architecture'], num_classes=0, in_chans=meta['channels'], **meta['kwargs'])",
    "model.load_state_dict(safetensors.torch.load_file('backbone.safetensors'))",
)
_LOAD_SMALL_STEM = (
    "model.conv1 = torch.nn.Conv2d(meta['channels'], model.bn1.num_features, 3, 1, 1, bias=False)",
    "model.maxpool = torch.nn.Identity()",
)


class Backbone(Encoder):
    """A timm model behind its normalisation: images (B, C, H, W) in [0, 1] -> features (B, D)."""

    OFFERS: ClassVar[tuple[str, ...]] = ("images",)
    config: BackboneConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        self.model = create_timm(config)
        key_drops(self.model, DropPath)
        self._size = _only_size(self.model)
        # what the pooled features of a model with a layer before its classifier have is that layer's width
        self.feature_dim = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)  # type: ignore[arg-type]
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, channel_values(name, values, config.channels), persistent=False)

    @classmethod
    def load_lines(cls, meta: Mapping[str, Any]) -> list[str]:
        return [_LOAD[0], *(_LOAD_SMALL_STEM if meta["stem"] == "small" else ()), _LOAD[1]]

    def reader(self, channels: int | None, size: int | None) -> Reader:
        assert channels is not None
        return ImageReader(channels, size, channels_last=True)

    def check_size(self, size: int) -> None:
        own = self._size
        if own not in (None, (size, size)):
            raise UserError(
                "this backbone takes images of one size",
                got=f"embed.size={size}, {self.config.architecture}",
                allowed="x".join(map(str, own)),
                fix="leave out embed.size",
            )

    def augmented(self, inputs: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
        return augment(inputs, random, recipe)

    def checkpoint_activations(self) -> None:
        """Keeps the inputs of the model's blocks only (Chen et al. 2016, https://arxiv.org/abs/1604.06174)."""
        if any(isinstance(module, _BatchNorm) for module in self.modules()):
            raise UserError(
                "activation_checkpointing computes blocks twice, and BatchNorm would count their statistics twice",
                got=self.config.architecture,
                allowed="models without BatchNorm, such as ViTs",
            )
        self.model.set_grad_checkpointing(True)  # type: ignore[operator]

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> what the model sees, in the fast layout of convolutions."""
        return channels_last((images - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        self._check_views(images)
        return self.model(self.normalise(images))

    def _check_views(self, images: Tensor) -> None:
        own = self._size
        if own is not None and tuple(images.shape[-2:]) != own:
            raise UserError(
                "this backbone takes images of one size, and the objective gives it another",
                got=f"{'x'.join(map(str, images.shape[-2:]))}, {self.config.architecture}",
                allowed="x".join(map(str, own)),
                fix="set backbone.kwargs.img_size to the size of the views or patches, or dynamic_img_size=true",
            )

    @property
    def vit(self) -> VisionTransformer:
        """The model, where it is a plain ViT (timm: `patch_embed.patch_size`, `.grid_size`, `num_prefix_tokens`)."""
        if not isinstance(self.model, VisionTransformer):
            raise UserError(
                "tokens exist in a ViT only",
                got=self.config.architecture,
                allowed="timm's VisionTransformer family, e.g. vit_tiny_patch16_224",
            )
        return self.model

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, P + N, D): a ViT's P = `num_prefix_tokens` class and register tokens, then its N patches, row by row.

        keep: int64 (B, K), the patches that enter the encoder at all; none: all. Gives (B, P + K, D) then. The last
        norm is applied to every token, also where timm has it after its pooling (`global_pool: avg`): so it is trained.
        """
        self._check_views(images)
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(self.normalise(images)))
        if keep is not None:
            prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
            x = torch.cat([prefix, take_tokens(patches, keep)], dim=1)
        x = vit.norm_pre(x)
        x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x)
        return vit.fc_norm(vit.norm(x))

    def output_dim(self, output: str) -> int:
        """`cls`: a ViT's class token; `tokens_mean`: the mean of its patches; `layer:K`: the mean over positions of
        what block K of a ViT gives, or the K-th entry of timm's `feature_info` of a model of convolutions (the first of
        a ResNet's is its stem), counted from 1.
        """
        if output == "cls" and not self.vit.num_prefix_tokens:
            raise UserError("this backbone has no class token", got=f"output {output!r}", allowed="tokens_mean")
        layer = _LAYER.fullmatch(output)
        if layer is None:
            return int(self.vit.num_features)
        info = getattr(self.model, "feature_info", None) or []
        if not hasattr(self.model, "forward_intermediates") or int(layer[1]) > len(info):
            raise UserError("this backbone has no such layer", got=output, allowed=f"layer:1 to layer:{len(info)}")
        return int(info[int(layer[1]) - 1]["num_chs"])

    def take(self, inputs: Tensor, output: str) -> Tensor:
        layer = _LAYER.fullmatch(output)
        if layer is not None:
            model: Any = self.model
            [x] = model.forward_intermediates(
                self.normalise(inputs), indices=[int(layer[1]) - 1], intermediates_only=True, output_fmt="NCHW"
            )
            return x.mean(dim=(2, 3))
        tokens = self.tokens(inputs)  # (B, P + N, D)
        return tokens[:, 0] if output == "cls" else tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) in the layout that convolutions are fast in.

    The strides of one channel fit either layout, and torch takes the other: every map of the network would follow.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (channels * height * width, 1, channels * width, channels))


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) and int64 (B, K) -> (B, K, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def channel_values(name: str, values: list[float], channels: int) -> Tensor:
    """`backbone.mean` or `.std` as (1, C, 1, 1)."""
    if len(values) not in (1, channels):
        raise UserError(
            f"backbone.{name} has one value, or one a channel", got=values, allowed=f"1 or {channels} values"
        )
    return torch.tensor(values).view(1, -1, 1, 1)


def create_timm(config: BackboneConfig | FramesConfig) -> nn.Module:
    """The model, at random weights. It drops whole paths only (drop_path_rate): those are drawn by sample.

    Raises UserError for a name or arguments that timm does not know, and for dropout, which would draw by rank.
    """
    if not timm.is_model(config.architecture):
        raise UserError(
            f"timm has no model {config.architecture!r}{did_you_mean(config.architecture, timm.list_models())}",
            allowed="any name of timm.list_models()",
        )
    try:
        model = timm.create_model(config.architecture, num_classes=0, in_chans=config.model_channels, **config.kwargs)
    except TypeError as error:
        raise UserError(
            f"timm's {config.architecture} refuses these arguments", got=f"{config.kwargs}: {error}"
        ) from None
    _without_dropout(model, config.kwargs)
    if config.stem == "small":
        if not (hasattr(model, "conv1") and hasattr(model, "maxpool") and hasattr(model, "bn1")):
            raise UserError(
                "backbone.stem=small replaces a ResNet's first convolution and pool",
                got=config.architecture,
                allowed="timm's ResNet family",
                fix="set stem: default, and choose e.g. a small patch_size in kwargs for a ViT",
            )
        width: int = model.bn1.num_features  # type: ignore[union-attr, assignment]
        model.conv1 = nn.Conv2d(config.model_channels, width, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def _only_size(model: nn.Module) -> tuple[int, ...] | None:
    """The one size of images that the model takes; None where it takes several."""
    for module in model.modules():
        own = getattr(module, "img_size", None)
        if getattr(module, "strict_img_size", False) and own is not None:
            return tuple(own)
    return None


def _without_dropout(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Turns off what a model drops by its own defaults; refuses what is asked for."""
    asked = [name for name in kwargs if name.endswith(("drop_rate", "drop_block_rate")) and kwargs[name]]
    if asked:
        raise UserError(
            "this dropout would draw by rank, and not by sample",
            got=f"pretrain.backbone.kwargs.{asked[0]}={kwargs[asked[0]]}",
            fix=f"leave {asked[0]} out; drop_path_rate, stochastic depth, is drawn by sample",
        )
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if getattr(module, "drop_rate", 0.0):
            module.drop_rate = 0.0  # type: ignore[assignment] # of a model that calls the function
