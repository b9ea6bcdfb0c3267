"""Teachers: exponential moving averages of trained modules, outside the module tree that DeepSpeed holds.

Inside that tree a teacher would be partitioned, reset by a load at another world size, and rounded away in bfloat16.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslscale.models.norm import batch_norms, gather_batch_norm
from sslscale.objectives.base import Objective


class Teacher:
    """The average t <- m t + (1 - m) s of `students`, one after the other; never trained.

    m follows a cosine from `momentum` to 1 (BYOL, https://arxiv.org/abs/2006.07733, section 3.3). BatchNorm sees the
    teacher's own batches, as in the papers; dropout and stochastic depth are off.
    """

    def __init__(self, *students: nn.Module, momentum: float) -> None:
        self.students = nn.Sequential(*students)
        self.momentum = momentum
        self.network = gather_batch_norm(copy.deepcopy(self.students)).requires_grad_(False)
        for module in self.network.modules():
            module.training &= isinstance(module, _BatchNorm)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)

    @torch.no_grad()
    def follow(self) -> None:
        """Takes over the students' weights, where these were set before the first step."""
        torch._foreach_copy_(list(self.network.parameters()), list(self.students.parameters()))

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """One step of the average, towards the students' master weights."""
        rate = (1.0 - self.momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        torch._foreach_lerp_(list(self.network.parameters()), list(self.students.parameters()), rate)

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        tensors = self._tensors()
        assert tensors.keys() == state.keys(), "this teacher belongs to another objective"
        for name, value in tensors.items():
            value.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())


class TeacherObjective(Objective):
    """An objective whose `teacher` is slow state: it moves with the objective's device, and is saved with it."""

    max_zero_stage: ClassVar[int] = 2
    teacher: Teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.teacher.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def after_step(self, progress: float) -> None:
        self.teacher.update(progress)

    def batch_norms(self) -> list[nn.Module]:
        return [*super().batch_norms(), *batch_norms(self.teacher.network)]

    def slow_state(self) -> dict[str, Any]:
        return {**super().slow_state(), "teacher": self.teacher.state()}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        self.teacher.load(state["teacher"])
        super().load_slow_state({name: value for name, value in state.items() if name != "teacher"})
