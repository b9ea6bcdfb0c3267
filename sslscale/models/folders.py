"""Folders that others have trained, and what they hold: a timm hub model, or a transformers model of images or texts.

timm           config.json (architecture, pretrained_cfg), model.safetensors
images         config.json (model_type), model.safetensors, preprocessor_config.json
texts          config.json (model_type), model.safetensors, tokenizer.json; sentence-transformers' files beside them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import timm.models

from sslscale import storage
from sslscale.config import BackboneConfig, validate
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.huggingface import transformers_library
from sslscale.models.image import Backbone
from sslscale.models.text import hash_pretrained, load_pretrained
from sslscale.models.vision import PREPROCESSOR, load_vision, read_preprocessor
from sslscale.rundir import hash_file, hash_json, read_json

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def is_pretrained(folder: Path) -> bool:
    """Whether it is such a folder."""
    return storage.bring(folder / _CONFIG).is_file()


def describe_pretrained(folder: Path, channels: int | None) -> tuple[int | None, int, str]:
    """The channels (None: of texts), the own input size and the hash of what the folder computes.

    `channels` is for timm's models, which take others than they were trained with. Raises UserError where it is none of
    the three kinds, and where a file is missing.
    """
    kind = _kind(folder)
    if kind == "texts":
        weights, max_length = hash_pretrained(folder)
        return None, max_length, weights
    if kind == "images":
        hashes = _hashes(folder, (_CONFIG, _WEIGHTS, PREPROCESSOR))
        return load_vision(folder).channels, read_preprocessor(folder)[2], hash_json(hashes)
    hashes = _hashes(folder, (_CONFIG, _WEIGHTS))
    config, size = _timm_config(folder, channels)
    return config.channels, size, hash_json([*hashes, config.channels])


def load_folder(folder: Path, channels: int | None) -> Encoder:
    """The model of such a folder; `channels` as `describe_pretrained` gave them."""
    kind = _kind(folder)
    if kind == "texts":
        return load_pretrained(folder)
    if kind == "images":
        _hashes(folder, (_CONFIG, _WEIGHTS, PREPROCESSOR))
        return load_vision(folder)
    storage.bring(folder / _WEIGHTS)
    try:
        return Backbone(_timm_config(folder, channels)[0]).eval()
    except (OSError, RuntimeError) as error:
        raise UserError(
            "the weights of this folder cannot be used", got=f"{storage.shown(folder)}: {str(error).splitlines()[0]}"
        ) from None


def timm_normalisation(mean: Iterable[float], std: Iterable[float], channels: int) -> dict[str, list[float]]:
    """`mean` and `std` as weights of timm have them; 0.5 where they are of other channels."""
    own = {"mean": list(mean), "std": list(std)}
    return own if all(len(values) == channels for values in own.values()) else {"mean": [0.5], "std": [0.5]}


def _kind(folder: Path) -> Literal["timm", "images", "texts"]:
    settings = read_json(folder / _CONFIG)
    if "architecture" in settings:
        return "timm"
    name = settings.get("model_type")
    takes = _main_input(name)
    if takes == "pixel_values":
        return "images"
    if takes == "input_ids" and "vocab_size" in settings:
        return "texts"
    raise UserError(
        "this folder holds no backbone that is supported",
        got=f"{name or 'no model_type'} in {storage.shown(folder / _CONFIG)}",
        allowed="a timm hub model, or a transformers model of images alone or of texts alone",
    )


def _main_input(model_type: str | None) -> str | None:
    """The argument that transformers' model of this type takes first; None where it has no such model."""
    transformers = transformers_library("text")
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    config = transformers.CONFIG_MAPPING[model_type]
    model = transformers.MODEL_MAPPING.get(config, None)
    return None if model is None else getattr(model, "main_input_name", None)


def _hashes(folder: Path, names: Sequence[str]) -> list[str]:
    for name in names:
        if not storage.bring(folder / name).is_file():
            raise UserError(f"there is no {name} in the folder of the model", got=storage.shown(folder))
    return [hash_file(folder / name) for name in names]


def _timm_config(folder: Path, channels: int | None) -> tuple[BackboneConfig, int]:
    """The model of a folder as timm's `save_for_hf` and `push_to_hf_hub` write it, and its input size."""
    settings: dict[str, Any] = read_json(folder / _CONFIG)
    known = {**settings, **settings.get("pretrained_cfg", {})}
    saved = {field.name: known[field.name] for field in fields(timm.models.PretrainedCfg) if field.name in known}
    saved |= {"source": "", "file": str(folder / _WEIGHTS), "custom_load": False}
    own, *_, size = known["input_size"]
    config = {
        "architecture": settings["architecture"],
        "kwargs": {**settings.get("model_args", {}), "pretrained": True, "pretrained_cfg": saved},
        "channels": channels or own,
        **timm_normalisation(known["mean"], known["std"], channels or own),
    }
    config["kwargs"].pop("in_chans", None)
    config["kwargs"].pop("num_classes", None)
    return validate(BackboneConfig, config), size
