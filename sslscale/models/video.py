"""Video backbones: a timm model on every frame with temporal pooling, and transformers' VideoMAE.

B clips, T frames, C channels, D width. Clips are float (B, T, C, H, W) in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslscale.config import AugmentConfig, FramesConfig, VideoMAEConfig
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.drop_path import key_drops
from sslscale.models.huggingface import transformers_library, without_attention_dropout
from sslscale.models.image import Backbone, channel_values, channels_last
from sslscale.shards.video import ClipReader
from sslscale.views.keyed import KeyedRandom
from sslscale.views.video import augment_clip

_LOAD_GRU = "model.temporal = torch.nn.GRU(meta['feature_dim'], meta['feature_dim'], batch_first=True)"
_LOAD_VIDEOMAE = (
    "model = transformers.VideoMAEModel(transformers.VideoMAEConfig(**meta['arguments']))",
    "model.load_state_dict(safetensors.torch.load_file('backbone.safetensors'))",
)
_LAYER = re.compile(r"layer:([1-9]\d*)")


class FramesBackbone(Backbone):
    """A timm model on every frame; the mean over frames, or the last state of a GRU: clips -> (B, D).

    With a `window` of W frames it sees every W frames in a row at once, as W C channels (Karpathy et al. 2014, early
    fusion), S = T - W + 1 times: motion shows in its features, which one frame cannot tell, also in their mean.

    Single images (B, C, H, W) give the features of the timm model: so image objectives train it on sampled frames. A
    window sees the frame W times then.
    """

    OFFERS: ClassVar[tuple[str, ...]] = ("clips", "images")
    config: FramesConfig  # type: ignore[assignment]

    def __init__(self, config: FramesConfig, files: Path | None = None) -> None:
        super().__init__(config, files)  # type: ignore[arg-type]
        if config.temporal == "gru":  # within the model: it is exported with it
            self.model.temporal = nn.GRU(self.feature_dim, self.feature_dim, batch_first=True)
        if config.frames < config.window:
            raise UserError(
                "backbone.window is longer than the clip", got=config.window, allowed=f"1 to {config.frames}"
            )
        self.num_states = config.frames - config.window + 1

    @classmethod
    def load_lines(cls, meta: Mapping[str, Any]) -> list[str]:
        lines = super().load_lines(meta)
        if meta["window"] > 1:
            lines = [line.replace("meta['channels']", "meta['window'] * meta['channels']") for line in lines]
        return [*lines[:-1], _LOAD_GRU, lines[-1]] if meta["temporal"] == "gru" else lines

    def check_offers(self, takes: str) -> None:
        super().check_offers(takes)
        if takes == "images" and self.config.temporal == "gru":
            raise UserError(
                "an objective of images sees single frames, and would leave the GRU untrained that features go through",
                got="backbone.temporal=gru",
                fix="set backbone.temporal=mean, or choose frame_order",
            )

    def reader(self, channels: int | None, size: int | None) -> ClipReader:
        return ClipReader(self.config.frames, self.config.channels, size)

    def offer(self, takes: str, inputs: Tensor, random: KeyedRandom) -> Tensor:
        """For objectives of images: one frame of each clip."""
        if takes == "clips":
            return inputs
        frame = random.integers("frame", inputs.shape[1])
        return inputs[torch.arange(len(inputs), device=inputs.device), frame]

    def augmented(self, inputs: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
        return augment_clip(inputs, random, recipe)

    def normalise(self, images: Tensor) -> Tensor:
        frames = images.unflatten(1, (-1, self.config.channels))  # (B, W, C, H, W)
        normalised = super().normalise(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return channels_last(normalised.flatten(1, 2))

    def windows(self, clips: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, S, W C, H, W)."""
        return clips.unfold(1, self.config.window, 1).movedim(-1, 2).flatten(2, 3)

    def sequence(self, clips: Tensor) -> Tensor:
        """(B, S, D): the feature of each frame or window; with a GRU, its state there."""
        seen = self.windows(clips).transpose(0, 1)  # the rows of a batch are views of it, one after another
        features = super().forward(seen.flatten(0, 1)).unflatten(0, seen.shape[:2]).transpose(0, 1)
        return self.model.temporal(features)[0] if self.config.temporal == "gru" else features  # type: ignore[operator]

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 4:
            return super().forward(inputs.repeat(1, self.config.window, 1, 1))
        states = self.sequence(inputs)
        return states[:, -1] if self.config.temporal == "gru" else states.mean(dim=1)

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        single = images.shape[1] == self.config.channels  # not a window of frames
        return super().tokens(images.repeat(1, self.config.window, 1, 1) if single else images, keep)

    def take(self, inputs: Tensor, output: str) -> Tensor:
        """The mean over frames of the timm model's output."""
        seen = self.windows(inputs)
        return super().take(seen.flatten(0, 1), output).unflatten(0, seen.shape[:2]).mean(dim=1)


class VideoMAEBackbone(Encoder):
    """A ViT over tubelets in space and time (Tong et al. 2022, https://arxiv.org/abs/2203.12602): clips -> (B, D).

    The feature is the mean over tubelets. N tubelets: (T / tubelet_size) (size / patch_size)^2, time before space.
    """

    OFFERS: ClassVar[tuple[str, ...]] = ("clips",)
    config: VideoMAEConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: VideoMAEConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        transformers = transformers_library("video")
        settings = transformers.VideoMAEConfig(**_arguments(config))
        if config.frames % settings.tubelet_size or config.size % settings.patch_size:
            raise UserError(
                "videomae: the tubelets do not tile the clip",
                got=f"{config.frames} frames of {config.size}, tubelets of {settings.tubelet_size} frames by "
                f"{settings.patch_size} pixels",
                fix="set backbone.frames, backbone.size and backbone.kwargs.patch_size so that they divide",
            )
        self.model = transformers.VideoMAEModel(settings)
        key_drops(self.model, nn.Dropout)
        self.feature_dim = int(settings.hidden_size)
        self.patch_size, self.tubelet_size = int(settings.patch_size), int(settings.tubelet_size)
        self.num_spatial = (config.size // self.patch_size) ** 2
        self.num_temporal = self.num_states = config.frames // self.tubelet_size
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, channel_values(name, values, config.channels), persistent=False)

    @classmethod
    def load_lines(cls, meta: Mapping[str, Any]) -> list[str]:
        return list(_LOAD_VIDEOMAE)

    def meta(self) -> dict[str, Any]:
        return {"arguments": _arguments(self.config)}

    def reader(self, channels: int | None, size: int | None) -> ClipReader:
        return ClipReader(self.config.frames, self.config.channels, self.config.size)

    def augmented(self, inputs: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
        return augment_clip(inputs, random, recipe.model_copy(update={"size": self.config.size}))

    def normalise(self, clips: Tensor) -> Tensor:
        return (clips - self.mean) / self.std

    def tokens(self, clips: Tensor, masked: Tensor | None = None) -> Tensor:
        """(B, N, D); with bool `masked` (B, N), equally many in each clip, the others' only and in their order."""
        return self.model(self.normalise(clips), bool_masked_pos=masked).last_hidden_state

    def sequence(self, clips: Tensor) -> Tensor:
        """(B, T / tubelet_size, D): the mean over space at each time."""
        return self.tokens(clips).unflatten(1, (self.num_temporal, self.num_spatial)).mean(dim=2)

    def forward(self, clips: Tensor) -> Tensor:
        return self.tokens(clips).mean(dim=1)

    def output_dim(self, output: str) -> int:
        """`tokens_mean`, the pooled feature; `layer:K`: the mean over tubelets of what block K gives."""
        layer, layers = _LAYER.fullmatch(output), int(self.model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        if output == "cls":
            raise UserError("this backbone has no class token", got=f"output {output!r}", allowed="tokens_mean")
        if layer is not None and int(layer[1]) > layers:
            raise UserError("this backbone has no such layer", got=output, allowed=f"layer:1 to layer:{layers}")
        return self.feature_dim

    def take(self, inputs: Tensor, output: str) -> Tensor:
        layer = _LAYER.fullmatch(output)
        if layer is None:
            return self(inputs)
        found = self.model(self.normalise(inputs), output_hidden_states=True)
        return found.hidden_states[int(layer[1])].mean(dim=1)

    def checkpoint_activations(self) -> None:
        self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _arguments(config: VideoMAEConfig) -> dict[str, Any]:
    """The model's own arguments. `use_mean_pooling` is off: with it the last norm lies in a head that is not here."""
    defaults = transformers_library("video").VideoMAEConfig().to_dict()
    shape = {"image_size": config.size, "num_frames": config.frames, "num_channels": config.channels}
    return {**shape, "use_mean_pooling": False, **without_attention_dropout(defaults, config.kwargs)}
