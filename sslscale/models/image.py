"""Image backbones: any timm model by name and arguments, and their export to a folder that plain timm loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import Tensor, nn

from sslscale.config import BackboneConfig, validate
from sslscale.errors import UserError, did_you_mean
from sslscale.models.base import Embedder
from sslscale.rundir import FORMAT_VERSION, hash_file, read_json, write_json

# What backbone.json tells a reader who has timm and nothing of ours.
_LOAD = (
    "model = timm.create_model(meta['architecture'], num_classes=0, in_chans=meta['channels'], **meta['kwargs'])",
    "model.load_state_dict(safetensors.torch.load_file('backbone.safetensors'))",
)
_LOAD_SMALL_STEM = (
    "model.conv1 = torch.nn.Conv2d(meta['channels'], model.bn1.num_features, 3, 1, 1, bias=False)",
    "model.maxpool = torch.nn.Identity()",
)


class Backbone(Embedder):
    """A timm model behind its normalisation: images (B, C, H, W) in [0, 1] -> features (B, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _create(config)
        self.feature_dim = int(self.model.num_features)  # type: ignore[arg-type]
        for name, values in (("mean", config.mean), ("std", config.std)):
            if len(values) not in (1, config.channels):
                raise UserError(
                    f"backbone.{name} has one value, or one a channel",
                    got=values,
                    allowed=f"1 or {config.channels} values",
                )
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

        self.frozen = False

    def freeze(self) -> None:
        """Holds weights and BatchNorm statistics as they are, whatever `train` is called with later."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(mode and not self.frozen)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> what the model sees, in the fast layout of convolutions."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))

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
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(self.normalise(images)))
        if keep is not None:
            prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
            x = torch.cat([prefix, take_tokens(patches, keep)], dim=1)
        return vit.fc_norm(vit.norm(vit.blocks(vit.norm_pre(x))))


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) and int64 (B, K) -> (B, K, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _create(config: BackboneConfig) -> nn.Module:
    if not timm.is_model(config.architecture):
        raise UserError(
            f"timm has no model {config.architecture!r}{did_you_mean(config.architecture, timm.list_models())}",
            allowed="any name of timm.list_models()",
        )
    try:
        model = timm.create_model(config.architecture, num_classes=0, in_chans=config.channels, **config.kwargs)
    except TypeError as error:
        raise UserError(
            f"timm's {config.architecture} refuses these arguments", got=f"{config.kwargs}: {error}"
        ) from None
    if config.stem == "small":
        if not (hasattr(model, "conv1") and hasattr(model, "maxpool") and hasattr(model, "bn1")):
            raise UserError(
                "backbone.stem=small replaces a ResNet's first convolution and pool",
                got=config.architecture,
                allowed="timm's ResNet family",
                fix="set stem: default, and choose e.g. a small patch_size in kwargs for a ViT",
            )
        width: int = model.bn1.num_features  # type: ignore[union-attr, assignment]
        model.conv1 = nn.Conv2d(config.channels, width, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def export_backbone(
    config: BackboneConfig, state: dict[str, Tensor], folder: Path, *, feature_dim: int, size: int
) -> str:
    """Writes `backbone.safetensors` and `backbone.json` (last). Returns the sha256 that names this backbone.

    state: the timm model's own state dict. size: side of the images that it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".backbone.safetensors.tmp"
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, str(temporary))
    temporary.replace(folder / "backbone.safetensors")
    sha256 = hash_file(folder / "backbone.safetensors")
    meta = {
        "format_version": FORMAT_VERSION,
        "library": config.library,
        "architecture": config.architecture,
        "kwargs": config.kwargs,
        "stem": config.stem,
        "channels": config.channels,
        "input_size": size,
        "mean": config.mean,
        "std": config.std,
        "feature_dim": feature_dim,
        "sha256": sha256,
        "load": [_LOAD[0], *(_LOAD_SMALL_STEM if config.stem == "small" else ()), _LOAD[1]],
    }
    write_json(folder / "backbone.json", meta)
    return sha256


def read_backbone_meta(folder: Path) -> dict[str, Any]:
    """backbone.json, after checking that the weights beside it are the ones that it names."""
    if not (folder / "backbone.json").is_file():
        raise UserError(
            "there is no exported backbone here", got=str(folder), fix="run pretrain first, or give a backbone/ folder"
        )
    meta = read_json(folder / "backbone.json")
    weights = folder / "backbone.safetensors"
    if not weights.is_file() or hash_file(weights) != meta["sha256"]:
        raise UserError(
            "backbone.safetensors is not the file that backbone.json names", got=str(folder), fix="export it again"
        )
    return meta


def load_backbone(folder: Path) -> Backbone:
    """The exported backbone in `folder`, in evaluation mode."""
    meta = read_backbone_meta(folder)
    fields = ("library", "architecture", "kwargs", "stem", "channels", "mean", "std")
    backbone = Backbone(validate(BackboneConfig, {name: meta[name] for name in fields}))
    backbone.model.load_state_dict(load_file(str(folder / "backbone.safetensors")))
    return backbone.eval()


def copy_backbone(source: Path, target: Path) -> None:
    """Copies an exported backbone; backbone.json last, so a reader never pairs it with other weights unnoticed."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("backbone.safetensors", "backbone.json"):
        temporary = target / f".{name}.tmp"
        shutil.copyfile(source / name, temporary)
        temporary.replace(target / name)
