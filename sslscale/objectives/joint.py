"""Several objectives train one backbone together: the sum of their losses, each with a weight and a schedule.

    loss = sum_t weight_t s_t(progress) loss_t

s_t is linear between the points (progress, factor) of the term's schedule. An unsupervised term and a self-supervised
one make joint training: e.g. IDEC keeps its reconstruction so (Guo et al. 2017), and SCAN its features.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Fraction
from sslscale.errors import UserError
from sslscale.models.drop_path import drops
from sslscale.models.image import Backbone
from sslscale.objectives.base import Corpus, Moment, Objective
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom


class Term(BaseModel):
    """One objective of several."""

    model_config = ConfigDict(extra="forbid")

    objective: dict[str, Any]
    weight: float = Field(1.0, ge=0.0)
    schedule: list[tuple[Fraction, float]] = Field(default_factory=lambda: [(0.0, 1.0)], min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Term:
        points = [progress for progress, _ in self.schedule]
        if points != sorted(set(points)):
            raise ValueError(f"the points of a schedule ascend in progress: {points}")
        return self


Terms = Annotated[list[Term], Field(min_length=1)]


class Joint(Objective):
    """Terms over one backbone. The first that gives an output, or names partners, gives it for all."""

    progress: Tensor

    def __init__(self, backbone: Backbone, recipe: AugmentConfig, *, terms: Terms) -> None:
        from sslscale.objectives import build_objective

        self.takes = backbone.OFFERS[0]  # type: ignore[misc] # each term is offered what it takes of that
        super().__init__(backbone, recipe)
        given = backbone.frozen
        self.settings = [Term.model_validate(term) for term in terms]
        self.terms = nn.ModuleList(build_objective(term.objective, backbone, recipe) for term in self.settings)
        if backbone.frozen and not given:
            raise UserError(
                "one of the terms holds the backbone fixed, so that the others could not train it",
                got=", ".join(str(term.objective["name"]) for term in self.settings),
                fix="train it alone, from the backbone of another run (pretrain.init_from)",
            )
        if len(self.terms) > 1 and drops(backbone) and backbone.checkpoints_activations:
            raise UserError(
                "each term draws what it drops, and a block that is computed again would draw as the last one",
                got="pretrain.activation_checkpointing=true with stochastic depth or dropout",
                fix="leave one of them out",
            )
        for term in self.terms:  # they use the backbone; this objective alone owns it
            del term._modules["backbone"]
            object.__setattr__(term, "backbone", backbone)
        self.register_buffer("progress", torch.zeros(()))
        self.views = self._make_views

    @property
    def parts(self) -> list[Objective]:
        return list(self.terms)  # type: ignore[arg-type]

    @property
    def needs_whole_batch(self) -> bool:  # type: ignore[override]
        return any(term.needs_whole_batch for term in self.parts)

    @property
    def max_zero_stage(self) -> int:  # type: ignore[override]
        return min(term.max_zero_stage for term in self.parts)

    @property
    def further_outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for term in self.parts for name in term.further_outputs))

    def _make_views(self, inputs: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        made = [term.make_views(inputs, random.fold(str(at))) for at, term in enumerate(self.parts)]
        return {f"{at}/{name}": view for at, views in enumerate(made) for name, view in views.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        total = batch.random.keys.new_zeros((), dtype=torch.float32)
        for at, (term, settings) in enumerate(zip(self.parts, self.settings, strict=True)):
            found = term(_part(batch, at))
            points = np.array(settings.schedule)
            factor = np.interp(float(self.progress), points[:, 0], points[:, 1])
            total = total + settings.weight * factor * found["loss"]
            metrics |= {f"{settings.objective['name']}_{name}": value for name, value in found.items()}
        return {"loss": total, **metrics}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        found = {"features": self.backbone(images)}
        for term in self.parts:
            if term.further_outputs:
                found = {**term.outputs(images), **found}
        return found

    def prepares_at(self, moment: Moment) -> bool:
        return any(term.prepares_at(moment) for term in self.parts)

    def prepare(self, corpus: Corpus, moment: Moment) -> None:
        for term in self.parts:
            if term.prepares_at(moment):
                term.prepare(corpus, moment)

    def partners(self, ids: Tensor, random: KeyedRandom) -> Tensor | None:
        named = (term.partners(ids, random) for term in self.parts)
        return next((partners for partners in named if partners is not None), None)

    def evaluate(self, inputs: Tensor, random: KeyedRandom) -> dict[str, float]:
        measured: dict[str, float] = {}
        for term in self.parts:
            measured = {**term.evaluate(inputs, random), **measured}
        return measured

    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)
        for term in self.parts:
            term.after_step(progress)

    def batch_norms(self) -> list[nn.Module]:
        found = [*super().batch_norms(), *(module for term in self.parts for module in term.batch_norms())]
        return list(dict.fromkeys(found))

    def slow_state(self) -> dict[str, Any]:
        own = {name: value for name, value in super().slow_state().items() if not name.startswith("terms.")}
        return {"own": own, "terms": {str(at): term.slow_state() for at, term in enumerate(self.parts)}}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        terms = {
            f"terms.{at}.{name}": value for at, term in enumerate(self.parts) for name, value in term.named_buffers()
        }
        super().load_slow_state({**state["own"], **terms})
        for at, term in enumerate(self.parts):
            term.load_slow_state(state["terms"][str(at)])


def _part(batch: Batch, at: int) -> Batch:
    """What a term sees of a batch: its own views and draws."""
    prefix = f"{at}/"
    views = {name.removeprefix(prefix): view for name, view in batch.views.items() if name.startswith(prefix)}
    partner = None if batch.partner is None else _part(batch.partner, at)
    return Batch(views, batch.random.fold(str(at)), batch.ids, partner)
