"""Where a backbone's first weights come from: an earlier run, an exported folder, or a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm.models
from safetensors.torch import load_file

from sslscale import storage
from sslscale.config import AnyBackboneConfig
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.export import read_backbone_meta
from sslscale.rundir import hash_file


def hash_weights(source: str, config: AnyBackboneConfig) -> str:
    """The sha256 of what `source` names: a run directory, an exported backbone/ folder, or a file of a timm model.

    Raises UserError where there are no weights, or where they were trained behind another stem or normalisation.
    """
    path = _weights_file(source)
    if path.name != "backbone.safetensors":
        return hash_file(path)
    meta = read_backbone_meta(path.parent)
    ours = config.model_dump()
    differ = [
        f"{name}: {meta.get(name)!r} there, {ours[name]!r} here"
        for name in config.WEIGHTS_FIT
        if meta.get(name) != ours[name]
    ]
    if differ:
        raise UserError("pretrain.init_from is another backbone than pretrain.backbone", got="; ".join(differ))
    return meta["sha256"]


def load_weights(backbone: Encoder, source: str) -> None:
    """Puts the weights that `source` names into `backbone`; every name and shape must fit, a classifier is left out."""
    path = _weights_file(source)
    if path.suffix == ".safetensors":
        state: dict[str, Any] = load_file(str(path))
    else:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    classifier: Any = getattr(backbone.model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    expected = backbone.model.state_dict()
    state = {name: value for name, value in state.items() if name in expected or not name.startswith(heads)}
    try:
        backbone.model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UserError(
            "pretrain.init_from does not fit pretrain.backbone",
            got=f"{source}: {' '.join(lines)}",
            fix="give pretrain.backbone the architecture and kwargs that the weights belong to",
        ) from None


def initial_run(source: str) -> Path | None:
    """The run directory that `source` is, None where it names weights alone."""
    path = storage.local_path(source)
    is_run = not storage.bring(path / "backbone.json").is_file() and not storage.bring(path).is_file()
    return path if is_run else None


def initial_files(source: str) -> Path:
    """The folder in which an export of `source` has the files beside its weights."""
    return _weights_file(source).parent


def _weights_file(source: str) -> Path:
    path = storage.local_path(source)
    folders = (path, path / "pretrain" / "backbone")
    folder = next((f for f in folders if storage.bring(f / "backbone.json").is_file()), None)
    if folder is not None:
        return storage.bring(folder / "backbone.safetensors")
    if not storage.bring(path).is_file():
        raise UserError(
            "there are no weights at pretrain.init_from",
            got=source,
            allowed="a run directory with a trained backbone, a backbone/ folder, or a file of timm's weights",
        )
    return path
