"""Backbones by their library, and their export: a folder that plain timm or transformers loads.

backbone.safetensors   the library's model
backbone.json          how to make it again, and what its inputs are; written last
tokenizer.json ...     what else it needs: the FILES of its class
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sslscale import storage
from sslscale.config import AnyBackboneConfig, validate
from sslscale.config.backbones import BACKBONES
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.rundir import FORMAT_VERSION, hash_file, hash_json, read_json, write_json

WEIGHTS = "backbone.safetensors"
CLASSES = {
    "timm": "sslscale.models.image:Backbone",
    "timm_frames": "sslscale.models.video:FramesBackbone",
    "videomae": "sslscale.models.video:VideoMAEBackbone",
    "transformers": "sslscale.models.text:TextBackbone",
}


def backbone_class(library: str) -> type[Encoder]:
    module, _, name = CLASSES[library].partition(":")
    return getattr(importlib.import_module(module), name)


def build_backbone(config: AnyBackboneConfig, files: Path | None = None) -> Encoder:
    """The backbone that a config names, at random weights; `files` is the folder of what `Encoder.fit` made for it."""
    return backbone_class(config.library)(config, files)


def export_backbone(backbone: Encoder, state: dict[str, Tensor], folder: Path, *, size: int) -> str:
    """Writes the folder. Returns the sha256 that names this backbone: of its weights, or of all its files' hashes.

    state: the library's model's own state dict. size: side of the images, or tokens of the texts, of its training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, str(temporary))
    temporary.replace(folder / WEIGHTS)
    storage.publish(folder / WEIGHTS)
    for name in backbone.FILES:
        assert backbone.files is not None
        _copy(backbone.files / name, folder / name)
    files = {name: hash_file(folder / name) for name in (WEIGHTS, *backbone.FILES)}
    sha256 = files[WEIGHTS] if len(files) == 1 else hash_json(files)
    meta = {
        "format_version": FORMAT_VERSION,
        **backbone.config.model_dump(mode="json"),
        **backbone.meta(),
        "channels": backbone.config.channels,
        "input_size": size,
        "feature_dim": backbone.feature_dim,
        "sha256": sha256,
        "files": files,
    }
    write_json(folder / "backbone.json", {**meta, "load": backbone.load_lines(meta)})
    return sha256


def read_backbone_meta(folder: Path) -> dict[str, Any]:
    """backbone.json, after checking that the files beside it are the ones that it names."""
    if not storage.bring(folder / "backbone.json").is_file():
        raise UserError(
            "there is no exported backbone here", got=str(folder), fix="run pretrain first, or give a backbone/ folder"
        )
    meta = read_json(folder / "backbone.json")
    for name, sha256 in _files(meta).items():
        file = storage.bring(folder / name)
        if not file.is_file() or hash_file(file) != sha256:
            raise UserError(f"{name} is not the file that backbone.json names", got=str(folder), fix="export it again")
    return meta


def _files(meta: dict[str, Any]) -> dict[str, str]:
    """Name -> sha256 of what an export holds beside backbone.json; the first ones named their weights only."""
    return meta.get("files", {WEIGHTS: meta["sha256"]})


def load_backbone(folder: Path) -> Encoder:
    """The exported backbone in `folder`, in evaluation mode."""
    meta = read_backbone_meta(folder)
    model = BACKBONES[meta["library"]]
    config = validate(model, {name: meta[name] for name in model.model_fields if name in meta})
    backbone = backbone_class(meta["library"])(config, folder)
    backbone.model.load_state_dict(load_file(str(folder / WEIGHTS)))
    return backbone.eval()


def copy_backbone(source: Path, target: Path) -> None:
    """Copies an exported backbone; backbone.json last, so a reader never pairs it with other weights unnoticed."""
    target.mkdir(parents=True, exist_ok=True)
    meta = read_json(source / "backbone.json")
    for name in (*_files(meta), "backbone.json"):
        _copy(source / name, target / name)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
    storage.publish(target)
