"""The torch optimizer inside the engine: parameter groups, schedules, and a step that can be skipped."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from sslscale.config import OptimizerConfig
from sslscale.errors import UserError
from sslscale.models.collectives import all_reduce, world_size


class _Skippable:
    """Mixin: while `skip` is set, `step` leaves parameters and moments as they are.

    Every ZeRO stage ends in this optimizer's own step (stage 3 once a sub-group), so a bad step is skipped in one
    place, whatever DeepSpeed keeps around it.
    """

    skip = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)  # type: ignore[misc]


class AdamW(_Skippable, torch.optim.AdamW):
    """torch's AdamW."""


class SGD(_Skippable, torch.optim.SGD):
    """torch's SGD."""


class _LARS(torch.optim.Optimizer):
    """LARS (You et al. 2017, https://arxiv.org/abs/1708.03888): SGD whose step follows the size of a layer's weights.

        v <- momentum v + trust (g + decay w),    w <- w - lr v,    trust = eta |w| / (|g| + decay |w|)

    trust is 1 in groups that are not `decays` (biases and norms), as in SimCLR and BYOL. A group that decays holds one
    parameter, or this rank's part of it: ZeRO cuts a group into flat pieces, and so the squares are summed over ranks.
    Where each rank has the whole, both norms grow by the same factor and trust stays what it is.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, trust_coefficient: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if group["decays"]:
                    update *= self._trust(parameter, parameter.grad, group)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(velocity, alpha=-group["lr"])

    @staticmethod
    def _trust(weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        squares = torch.stack([weight.square().sum(), gradient.square().sum()])
        if world_size() > 1:
            all_reduce(squares)
        w, g = squares.sqrt()
        trust = group["trust_coefficient"] * w / (g + group["weight_decay"] * w + 1e-8)
        return torch.where((w > 0) & (g > 0), trust, 1.0)


class LARS(_Skippable, _LARS):
    """LARS for whole parameters and for ZeRO's pieces of them."""


Optimizer = AdamW | SGD | LARS


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Weights decay; biases, norms and other vectors do not. A layer of the backbone has its own share of the rate.

    Groups carry `decays` and `lr_scale`, which `set_schedules` reads.
    """
    scales = _layer_scales(module, config.layer_decay) if config.layer_decay < 1 else {}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays, scale = parameter.dim() > 1, scales.get(name, 1.0)
        key = (decays, scale, name if decays and config.name == "lars" else None)
        group = {"params": [], "weight_decay": config.weight_decay if decays else 0.0, "decays": decays}
        groups.setdefault(key, {**group, "lr_scale": scale})["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (-key[0], -key[1]))]
    if config.name == "sgd":
        return SGD(ordered, lr=config.lr, momentum=config.momentum)
    if config.name == "lars":
        return LARS(ordered, lr=config.lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    return AdamW(ordered, lr=config.lr, betas=config.betas, fused=True)


def _layer_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Parameter name -> decay^(layers above it), by timm's own order of the backbone's layers; the heads lie on top.

    Bao et al. 2021 (BEiT), https://arxiv.org/abs/2106.08254.
    """
    backbone: Any = module.backbone
    model = backbone.model
    if not hasattr(model, "group_matcher"):
        raise UserError("optimizer.layer_decay needs a timm model that names its layers", got=type(model).__name__)
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    top = max(layers.values()) + 1
    return {f"backbone.model.{name}": decay ** (top - layer) for name, layer in layers.items()}


def set_schedules(groups: list[dict[str, Any]], config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Gives every group its learning rate and weight decay of this step; returns the learning rate at scale 1."""
    lr, decay = learning_rate(config, step, total_steps), weight_decay(config, step, total_steps)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over the first share of the steps, then a cosine from `lr` to `final_lr`; step counts from 0."""
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return _cosine(config.lr, config.final_lr, (step - warmup) / max(1, total_steps - warmup))


def weight_decay(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """A cosine from `weight_decay` to `final_weight_decay` over all steps; constant where there is no final one."""
    if config.final_weight_decay is None:
        return config.weight_decay
    return _cosine(config.weight_decay, config.final_weight_decay, step / total_steps)


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * progress))
