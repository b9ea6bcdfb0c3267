"""Image models of transformers, from a folder that others have trained.

B images, C channels, S side, P prefix tokens (class, distillation, registers), N patches, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sslscale import storage
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.huggingface import transformers_library
from sslscale.models.image import channel_values
from sslscale.rundir import read_json

PREPROCESSOR = "preprocessor_config.json"
_LAYER = re.compile(r"layer:([1-9]\d*)")


class VisionBackbone(Encoder):
    """`model` behind the normalisation of its preprocessor: images (B, C, S, S) in [0, 1] -> features (B, D).

    The feature is what the model's own pooler gives; without one, its class token, or else the mean over positions.
    """

    OFFERS: ClassVar[tuple[str, ...]] = ("images",)
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: list[float], std: list[float], size: int) -> None:
        super().__init__(model.config, None)
        self.model, self.size = model, size
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        self.has_class_token = bool(names & {"cls_token", "class_embedding"})
        registers = getattr(self.config, "num_register_tokens", 0) if "register_tokens" in names else 0
        self.num_prefix_tokens = self.has_class_token + ("distillation_token" in names) + registers
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, channel_values(name, values, self.channels), persistent=False)
        self.feature_dim = self._width(self, size)

    @property
    def channels(self) -> int:
        return int(getattr(self.config, "num_channels", 3))

    def check_size(self, size: int) -> None:
        self._width(self, size)

    def forward(self, images: Tensor) -> Tensor:
        found = self._run(images)
        pooled = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        return found.last_hidden_state[:, 0] if self.has_class_token else self._mean(found.last_hidden_state)

    def output_dim(self, output: str) -> int:
        """`cls`; `tokens_mean`; `layer:K`: the mean over positions of what block or stage K gives, counted from 1."""
        return self._width(lambda images: self.take(images, output), self.size)

    def take(self, inputs: Tensor, output: str) -> Tensor:
        layer = _LAYER.fullmatch(output)
        if layer is not None:
            states = self._run(inputs, output_hidden_states=True).hidden_states
            if int(layer[1]) >= len(states):
                allowed = f"layer:1 to layer:{len(states) - 1}"
                raise UserError("this backbone has no such layer", got=output, allowed=allowed)
            return self._mean(states[int(layer[1])])
        if output == "cls" and not self.has_class_token:
            raise UserError("this backbone has no class token", got=f"output {output!r}", allowed="tokens_mean")
        states = self._run(inputs).last_hidden_state
        return states[:, 0] if output == "cls" else self._mean(states)

    def _run(self, images: Tensor, **asked: bool) -> Any:
        return self.model(pixel_values=(images - self.mean) / self.std, **asked)

    def _mean(self, states: Tensor) -> Tensor:
        """(B, P + N, D) or (B, D, H, W) -> (B, D): the mean over positions."""
        return states[:, self.num_prefix_tokens :].mean(dim=1) if states.ndim == 3 else states.mean(dim=(2, 3))

    def _width(self, function: Callable[[Tensor], Tensor], size: int) -> int:
        """Of what `function` gives. UserError where the model does not take images of that size."""
        device = next(self.model.parameters()).device
        try:
            with torch.inference_mode():
                return function(torch.zeros(1, self.channels, size, size, device=device)).shape[1]
        except UserError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"the {self.config.model_type} does not take images of {size}x{size}",
                got=str(error).splitlines()[0],
                fix="leave out embed.size",
            ) from None


def load_vision(folder: Path) -> VisionBackbone:
    """The model in a folder of transformers, its files being there."""
    model, report = transformers_library("text").AutoModel.from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if any(not name.startswith("pooler.") for name in missing):
        raise UserError("the weights lack some of the model", got=f"{storage.shown(folder)}: {missing[0]}")
    if missing:
        model.pooler = None  # of weights that were trained with another head: it would be random
    mean, std, size = read_preprocessor(folder)
    return VisionBackbone(model.eval(), mean, std, size).eval()


def read_preprocessor(folder: Path) -> tuple[list[float], list[float], int]:
    """Mean and std of channels in [0, 1], and the side of the images that the model is given."""
    settings = read_json(folder / PREPROCESSOR)
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    odd = [name for name in ("do_flip_channel_order", "rescale_offset") if settings.get(name)]
    if odd or abs(factor * 255 - 1) > 1e-3:
        raise UserError(
            f"{PREPROCESSOR} asks for what is not supported",
            got=", ".join(odd) or f"values times {factor}",
            allowed="RGB in [0, 1], less a mean, by a standard deviation",
        )
    normalised = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normalised else ([0.0], [1.0])
    return mean, std, _side(settings)


def _side(settings: Mapping[str, Any]) -> int:
    """Of what is cut out in the end, where anything is."""
    cropped = settings.get("do_center_crop") and "crop_size" in settings
    size = settings["crop_size" if cropped else "size"]
    if isinstance(size, int):
        return size
    height = size.get("height", size.get("shortest_edge"))
    if height is None or size.get("width", height) != height:
        raise UserError(f"{PREPROCESSOR} says no one side of square images", got=size)
    return int(height)
