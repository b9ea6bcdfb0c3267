"""The torch optimizer inside the engine: parameter groups, schedule, and a step that can be skipped."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sslscale.config import OptimizerConfig


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


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> AdamW | SGD:
    """Two groups: weights decay; biases, norms and other vectors do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum)
    return AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over the first share of the steps, then a cosine from `lr` to `final_lr`; step counts from 0."""
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
