"""Objectives by name. Adding one: its file, one line here, one config; or `package.module:Class` in a config."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, get_type_hints

from sslscale.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sslscale.config import AugmentConfig
    from sslscale.models.base import Encoder
    from sslscale.objectives.base import Objective

OBJECTIVES = {
    "barlow_twins": "sslscale.objectives.barlow_twins:BarlowTwins",
    "byol": "sslscale.objectives.byol:BYOL",
    "causal_lm": "sslscale.objectives.causal_lm:CausalLM",
    "colorization": "sslscale.objectives.colorization:Colorization",
    "context_prediction": "sslscale.objectives.context_prediction:ContextPrediction",
    "csi": "sslscale.objectives.csi:CSI",
    "deep_svdd": "sslscale.objectives.deep_svdd:DeepSVDD",
    "dino": "sslscale.objectives.dino:DINO",
    "experts": "sslscale.objectives.experts:Experts",
    "frame_order": "sslscale.objectives.frame_order:FrameOrder",
    "idec": "sslscale.objectives.idec:IDEC",
    "iic": "sslscale.objectives.iic:IIC",
    "inpainting": "sslscale.objectives.inpainting:Inpainting",
    "jigsaw": "sslscale.objectives.jigsaw:Jigsaw",
    "joint": "sslscale.objectives.joint:Joint",
    "mae": "sslscale.objectives.mae:MAE",
    "masked_lm": "sslscale.objectives.masked_lm:MaskedLM",
    "moco_v3": "sslscale.objectives.moco_v3:MoCoV3",
    "rotation": "sslscale.objectives.rotation:Rotation",
    "scan": "sslscale.objectives.scan:SCAN",
    "sela": "sslscale.objectives.sela:SeLa",
    "simclr": "sslscale.objectives.simclr:SimCLR",
    "simcse": "sslscale.objectives.simcse:SimCSE",
    "simsiam": "sslscale.objectives.simsiam:SimSiam",
    "swav": "sslscale.objectives.swav:SwAV",
    "temi": "sslscale.objectives.temi:TEMI",
    "transform_likelihood": "sslscale.objectives.transform_likelihood:TransformLikelihood",
    "vicreg": "sslscale.objectives.vicreg:VICReg",
    "video_mae": "sslscale.objectives.video_mae:VideoMAE",
}


def find_objective(name: str) -> type[Objective]:
    """The class registered as `name`, or the one at `package.module:Class`."""
    from sslscale.objectives.base import Objective

    location = OBJECTIVES.get(name, name)
    module, separator, attribute = location.partition(":")
    if not separator:
        raise UserError(
            f"there is no objective {name!r}{did_you_mean(name, OBJECTIVES)}",
            allowed=", ".join(sorted(OBJECTIVES)) + ", or package.module:Class",
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the objective {name!r} cannot be imported", got=str(error)) from None
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(f"{name!r} is not an objective", allowed="a subclass of sslscale.objectives.base.Objective")
    return found


def objective_settings(config: dict[str, Any]) -> tuple[type[Objective], dict[str, Any]]:
    """The objective's class and its settings, validated against the class's keyword arguments; defaults filled in."""
    from pydantic import ConfigDict, create_model

    from sslscale.config import validate

    settings = dict(config)
    if "name" not in settings:
        raise UserError("pretrain.objective needs a name", allowed=", ".join(sorted(OBJECTIVES)))
    name = str(settings.pop("name"))
    cls = find_objective(name)
    hints = get_type_hints(cls.__init__, include_extras=True)
    fields: dict[str, Any] = {
        parameter.name: (
            hints.get(parameter.name, Any),
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    model = create_model(cls.__name__, __config__=ConfigDict(extra="forbid", validate_default=True), **fields)
    return cls, validate(model, settings, prefix=f"pretrain.objective({name})").model_dump()


def build_objective(config: dict[str, Any], backbone: Encoder, recipe: AugmentConfig) -> Objective:
    """The objective that a config names, over `backbone`, with BatchNorm statistics over all ranks."""
    from sslscale.models.norm import gather_batch_norm

    cls, settings = objective_settings(config)
    objective = cls(backbone, recipe, **settings)
    objective.config = {"name": config["name"], **settings}
    gather_batch_norm(objective)
    return objective
