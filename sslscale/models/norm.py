"""BatchNorm with statistics over all ranks, on any device (torch's SyncBatchNorm refuses CPU tensors)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslscale.models.collectives import all_reduce, world_size


class _GatheredBatchNorm(torch.autograd.Function):
    """Normalises by the mean and variance of the global batch; the two sums that cross ranks are all-reduced.

    With x' = (x - mean) / std and g the gradient of the output, N the global count of a channel:
    dL/dx = weight / std * (g - sum(g) / N - x' sum(g x') / N)   (Ioffe & Szegedy 2015, section 3).
    Every pass over x or g is one of torch's own batch norm kernels, which read any layout and half precision at full
    speed; of the two that are fused in torch (moments and output, sums and gradient) only the first halves are wanted
    before the ranks have met.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)  # of weight's dtype: so are the moments then
        local_mean, local_var = (moment.double() for moment in torch.batch_norm_update_stats(x, zeros, ones, 0.0))
        # ranks hold equally many samples, so the global moments are plain means over ranks
        moments = torch.stack([local_mean, local_var + local_mean.square()])  # in double: a difference is taken of them
        all_reduce(moments)
        mean, square = (moments / world_size()).unbind()
        var = (square - mean.square()).clamp_(min=0.0).to(weight.dtype)
        mean = mean.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor):
        x, weight, mean, var = ctx.saved_tensors
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(  # sum(g x') and sum(g) over this rank
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight])
        all_reduce(sums)
        count = x.numel() // x.shape[1] * world_size()
        scale = weight * torch.rsqrt(var + ctx.eps)
        slope, offset = -scale * sums[1] / count, -scale * sums[0] / count  # of what is not g, over x'
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        if gradient.dtype != weight.dtype:  # addcmul_ would copy both maps to weight's precision
            own = F.batch_norm(gradient, zeros, ones, scale, zeros, training=False, eps=0.0)
            rest = F.batch_norm(x, mean, var, slope, offset, training=False, eps=ctx.eps)
            return own.add_(rest), grad_weight, grad_bias, None
        slope = slope * torch.rsqrt(var + ctx.eps)  # over x
        own = F.batch_norm(gradient, zeros, ones, scale, offset - slope * mean, training=False, eps=0.0)
        own.addcmul_(x, slope.view(-1, *[1] * (x.dim() - 2)))
        return own, grad_weight, grad_bias, None


class _Gathered:
    """Mixin over torch's BatchNorm classes: the same parameters, buffers and state names."""

    alone = False
    """Whether statistics are of this rank's samples: where all ranks have the same ones."""

    def _normalise(self, x: Tensor) -> Tensor:
        module: nn.BatchNorm2d = self  # type: ignore[assignment]
        if not module.training or self.alone or world_size() == 1:
            batch_stats = module.training
            if batch_stats and module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
            return F.batch_norm(
                x,
                module.running_mean,
                module.running_var,
                module.weight,
                module.bias,
                batch_stats,
                module.momentum or 0.0,
                module.eps,
            )
        assert module.running_mean is not None and module.running_var is not None
        assert module.num_batches_tracked is not None
        y, mean, var = _GatheredBatchNorm.apply(x, module.weight, module.bias, module.eps)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            module.num_batches_tracked.add_(1)
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), module.momentum or 0.0)
            module.running_var.lerp_((var * count / (count - 1)).to(module.running_var.dtype), module.momentum or 0.0)
        return y


class GatheredBatchNorm1d(_Gathered, nn.BatchNorm1d):
    """BatchNorm1d over the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(x)


class GatheredBatchNorm2d(_Gathered, nn.BatchNorm2d):
    """BatchNorm2d over the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(x)


class GatheredBatchNormAct2d(_Gathered, BatchNormAct2d):
    """timm's BatchNorm with its activation, over the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x)))


_GATHERED: dict[type, type] = {
    nn.BatchNorm1d: GatheredBatchNorm1d,
    nn.BatchNorm2d: GatheredBatchNorm2d,
    BatchNormAct2d: GatheredBatchNormAct2d,
}


def statistics(module: nn.Module) -> list[Tensor]:
    """What a forward pass in training mode writes: the running moments of every BatchNorm in `module`."""
    found = (child for child in module.modules() if isinstance(child, _BatchNorm))
    return [buffer for child in found for buffer in child.buffers(recurse=False)]


def gather_batch_norm(module: nn.Module) -> nn.Module:
    """Gives every BatchNorm in `module` statistics over all ranks, in place. Names and state stay as they are."""
    for child in module.modules():
        if type(child) in _GATHERED:
            child.__class__ = _GATHERED[type(child)]
    return module
