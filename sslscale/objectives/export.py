"""A trained objective in a folder beside its backbone's, for what its `outputs` give: cluster probabilities, scores.

objective/objective.safetensors   heads and persistent buffers: the state dict without the backbone's
         /objective.json          name, settings, views' recipe, further outputs, the backbone's sha256, and its own
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sslscale import storage
from sslscale.config import AugmentConfig, validate
from sslscale.errors import UserError
from sslscale.models.base import Encoder
from sslscale.models.export import load_backbone, read_backbone_meta
from sslscale.models.initial import initial_run
from sslscale.objectives import build_objective
from sslscale.objectives.base import Objective
from sslscale.objectives.teacher import TeacherObjective
from sslscale.rundir import FORMAT_VERSION, hash_file, read_json, write_json

WEIGHTS, META = "objective.safetensors", "objective.json"
_BACKBONE = "backbone."


def export_objective(
    objective: Objective,
    recipe: AugmentConfig,
    state: dict[str, Tensor],
    folder: Path,
    *,
    backbone: str,
) -> None:
    """Writes the two files, the JSON last.

    `recipe` is what the objective was built with; `state` is its whole state dict; `backbone` its backbone's sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in state.items() if not name.startswith(_BACKBONE)}
    save_file(own, str(folder / WEIGHTS))
    storage.publish(folder / WEIGHTS)
    weights = hash_file(folder / WEIGHTS)
    meta = {
        "format_version": FORMAT_VERSION,
        "objective": objective.config,
        "views": recipe.model_dump(mode="json"),
        "further_outputs": list(objective.further_outputs),
        "backbone": backbone,
        "weights": weights,
        "sha256": hashlib.sha256(f"{backbone} {weights}".encode()).hexdigest(),
    }
    write_json(folder / META, meta)


def read_objective_meta(folder: Path) -> dict[str, Any] | None:
    """objective.json, after checking the weights and the backbone beside it; None where there is no export."""
    if not storage.bring(folder / META).is_file():
        return None
    meta = read_json(folder / META)
    weights = storage.bring(folder / WEIGHTS)
    backbone = read_backbone_meta(folder.with_name("backbone"))["sha256"]
    if not weights.is_file() or hash_file(weights) != meta["weights"] or backbone != meta["backbone"]:
        raise UserError(
            "the exported objective belongs to other weights than those beside it",
            got=str(folder),
            fix="run pretrain again with --overwrite",
        )
    return meta


def load_objective(folder: Path, backbone: Encoder | None = None) -> Objective:
    """The exported objective in `folder`, over the backbone in the `backbone/` beside it, in evaluation mode.

    `backbone` is that one, where it is loaded already.
    """
    meta = read_objective_meta(folder)
    assert meta is not None, folder
    recipe = validate(AugmentConfig, meta["views"])
    backbone = backbone or load_backbone(folder.with_name("backbone"))
    trained = {name: value.clone() for name, value in backbone.state_dict().items()}
    objective = build_objective(meta["objective"], backbone, recipe)
    backbone.load_state_dict(trained)  # an objective may change weights that its training starts from
    missing, unexpected = objective.load_state_dict(load_file(str(folder / WEIGHTS)), strict=False)
    assert not unexpected and all(name.startswith(_BACKBONE) for name in missing), (missing, unexpected)
    return objective.eval()


@torch.no_grad()
def load_heads(objective: Objective, source: str | None) -> str | None:
    """Gives the objective, or each of its parts, the heads that the same one was trained with in the run at `source`.

    The same is who has the same name and settings; weights alone come without heads. Returns the sha256 of the export
    that heads were taken of, None where there were none. What an objective sets before the first step comes after.
    """
    run = None if source is None else initial_run(source)
    folder = run and run / "pretrain" / "objective"
    if folder is None or read_objective_meta(folder) is None:
        return None
    theirs, taken = load_objective(folder), False
    for part in objective.parts:
        own = part.own_parameters()
        for other in theirs.parts:
            there = other.own_parameters()
            if part.config == other.config and _shapes(own) == _shapes(there):
                for name, value in own.items():
                    value.copy_(there[name])
                taken = taken or bool(own)
        if isinstance(part, TeacherObjective):
            part.teacher.follow()
    return read_json(folder / META)["sha256"] if taken else None


def _shapes(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in parameters.items()}


def copy_objective(source: Path, target: Path) -> None:
    """Copies an export, its JSON last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, META):
        temporary = target / f".{name}.tmp"
        shutil.copyfile(source / name, temporary)
        temporary.replace(target / name)
        storage.publish(target / name)
