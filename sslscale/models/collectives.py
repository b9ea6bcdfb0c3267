"""Differentiable exchange between ranks, for losses and statistics that look across the whole batch.

Convention: every rank's loss is the mean over its own share, and the engine averages gradients over ranks. Then the
backward of a gather or a sum over ranks is the sum over ranks of what flowed back, and the N-rank gradient equals the
1-rank gradient on the same global batch. With one rank everything is the identity.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) on every rank -> (W B, ...) in rank order, without a gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather_rows(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        share = len(total) // world_size()
        return total[rank() * share : (rank() + 1) * share]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, differentiable."""
    return _AllReduceSum.apply(x) if world_size() > 1 else x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of `x` over ranks, differentiable."""
    return all_reduce_sum(x) / world_size()


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) on every rank -> (W B, ...) in rank order, differentiable."""
    return _AllGather.apply(x) if world_size() > 1 else x
