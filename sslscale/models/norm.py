"""BatchNorm that gives the same on any number of ranks, with statistics of one of two kinds.

global   of the global batch, for which the ranks meet twice a layer, on any device (torch's SyncBatchNorm refuses CPU
         tensors)
stream   of each stream's rows in a pass, without meeting: ghost batches (Hoffer et al. 2017,
         https://arxiv.org/abs/1705.08741) that the shard plan draws, since a stream is always whole on one rank
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslscale.errors import UserError
from sslscale.models.collectives import all_reduce, world_size

_BLOCK = 4096  # values of a channel that are added up in single precision


def _blocks(x: Tensor, stream_rows: int) -> tuple[Tensor, ...]:
    """Rows whose sums are taken by themselves: of one stream each, the same ones on any number of ranks.

    torch's CPU kernels add up the values of a channel one by one in single precision. Over all rows of a pass, which
    are others on other numbers of ranks, that would round more than all else that a step does, and otherwise. A GPU's
    kernels add up by trees.
    """
    if x.device.type != "cpu":
        return (x,)
    return x.split(_rows_of_a_block(x.shape[2:].numel(), stream_rows))


@functools.cache
def _rows_of_a_block(values: int, stream_rows: int) -> int:
    """The most rows, of so many values of a channel each, that divide a stream's and stay within a block."""
    most = max(1, _BLOCK // max(1, values))
    return max(rows for rows in range(1, most + 1) if stream_rows % rows == 0)  # of 0, if not known, every number


class _GatheredBatchNorm(torch.autograd.Function):
    """Normalises by the mean and variance of the global batch; the two sums that cross ranks are all-reduced.

    With x' = (x - mean) / std and g the gradient of the output, N the global count of a channel:
    dL/dx = weight / std * (g - sum(g) / N - x' sum(g x') / N)   (Ioffe & Szegedy 2015, section 3).
    Every pass over x or g is one of torch's own batch norm kernels, which read any layout and half precision at full
    speed; of the two that are fused in torch (moments and output, sums and gradient) only the first halves are wanted
    before blocks of rows are added up, in double precision, and the ranks have met.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, stream_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)  # of weight's dtype: so are the moments then
        blocks = _blocks(x, stream_rows)
        means, variances = zip(
            *[torch.batch_norm_update_stats(block, zeros, ones, 0.0) for block in blocks], strict=True
        )
        local = torch.stack([torch.stack(means), torch.stack(variances)]).double()  # a difference is taken of them
        local[1] += local[0].square()
        shares = local.new_full((len(blocks),), len(blocks[0]) / len(x))
        shares[-1] = len(blocks[-1]) / len(x)
        moments = torch.einsum("mbc,b->mc", local, shares)
        all_reduce(moments)
        # ranks hold equally many samples, so the global moments are plain means over ranks
        mean, square = (moments / world_size()).unbind()
        var = (square - mean.square()).clamp_(min=0.0).to(weight.dtype)
        mean = mean.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.stream_rows = eps, stream_rows
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor):
        x, weight, mean, var = ctx.saved_tensors
        parts = [  # sum(g x') and sum(g) of each block
            torch.stack(
                torch.ops.aten.native_batch_norm_backward(
                    own, block, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
                )[1:]
            )
            for block, own in zip(*(_blocks(whole, ctx.stream_rows) for whole in (x, gradient)), strict=True)
        ]
        sums = torch.stack(parts).sum(dim=0, dtype=torch.float64)
        grad_weight, grad_bias = sums.to(weight.dtype, copy=True)  # of this rank; then over all
        all_reduce(sums)
        sums /= x.numel() // x.shape[1] * world_size()
        scale = weight * torch.rsqrt(var + ctx.eps)
        slope, offset = -scale * sums.to(weight.dtype)  # of what is not g, over x'
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        if gradient.dtype != weight.dtype:  # addcmul_ would copy both maps to weight's precision
            own = F.batch_norm(gradient, zeros, ones, scale, zeros, training=False, eps=0.0)
            rest = F.batch_norm(x, mean, var, slope, offset, training=False, eps=ctx.eps)
            return own.add_(rest), grad_weight, grad_bias, None, None
        slope = slope * torch.rsqrt(var + ctx.eps)  # over x
        own = F.batch_norm(gradient, zeros, ones, scale, offset - slope * mean, training=False, eps=0.0)
        own.addcmul_(x, slope.view(-1, *[1] * (x.dim() - 2)))
        return own, grad_weight, grad_bias, None, None


class _Gathered:
    """Mixin over torch's BatchNorm classes: the same parameters, buffers and state names."""

    alone = False
    """Whether statistics are of this rank's samples: where all ranks have the same ones."""
    stream_rows = 0
    """How many samples a pass has of a stream; 0: not known."""
    by_stream = False
    """Whether statistics are of each stream's samples, not of the global batch."""

    def _normalise(self, x: Tensor) -> Tensor:
        module: nn.BatchNorm2d = self  # type: ignore[assignment]
        if module.training and self.by_stream and not self.alone:
            return self._by_stream(x)
        if not module.training or self.alone or (world_size() == 1 and x.device.type != "cpu"):
            batch_stats = module.training or module.running_mean is None
            if module.training and module.num_batches_tracked is not None:
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
        count = x.numel() // x.shape[1] * world_size()
        if count < 2:
            raise UserError(
                "BatchNorm needs more than one value of every channel to train",
                got=f"a global batch of shape {tuple(x.shape)}",
                fix="raise pretrain.global_batch",
            )
        weight, bias = module.weight, module.bias
        if weight is None:
            weight = torch.ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            bias = torch.zeros_like(weight)
        y, mean, var = _GatheredBatchNorm.apply(x, weight, bias, module.eps, self.stream_rows)
        if module.running_mean is not None and module.running_var is not None:
            assert module.num_batches_tracked is not None
            with torch.no_grad():
                module.num_batches_tracked.add_(1)
                momentum = module.momentum or 0.0
                module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
                module.running_var.lerp_((var * count / (count - 1)).to(module.running_var.dtype), momentum)
        return y

    def _by_stream(self, x: Tensor) -> Tensor:
        """Each `stream_rows` rows by themselves. A pass holds whole streams, in their order, whatever number of rows
        an objective makes of a sample: so these are the same rows on any number of ranks.

        The running moments move by the mean over this rank's; whoever steps takes the mean over ranks.
        """
        module: nn.BatchNorm2d = self  # type: ignore[assignment]
        assert module.running_mean is not None and module.running_var is not None
        assert module.num_batches_tracked is not None
        if len(x) % self.stream_rows:
            raise UserError(
                "batch_norm=stream normalises as many rows of every sample, and here are rows of some samples only",
                got=f"{len(x)} rows, with {self.stream_rows} samples of a stream",
                fix="set pretrain.batch_norm: global for this objective",
            )
        parts = x.split(self.stream_rows)
        means = module.running_mean.new_zeros(len(parts), len(module.running_mean))
        variances = torch.ones_like(means)
        normalised = [
            F.batch_norm(part, mean, var, module.weight, module.bias, True, 1.0, module.eps)  # writes both moments
            for part, mean, var in zip(parts, means, variances, strict=True)
        ]
        with torch.no_grad():
            module.num_batches_tracked.add_(1)
            module.running_mean.lerp_(means.mean(dim=0), module.momentum or 0.0)
            module.running_var.lerp_(variances.mean(dim=0), module.momentum or 0.0)
        return torch.cat(normalised) if len(normalised) > 1 else normalised[0]


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


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Every BatchNorm in `module`."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What a forward pass in training mode writes: the running moments of BatchNorm modules."""
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def follow_streams(modules: Iterable[nn.Module], rows: int, by_stream: bool) -> None:
    """Tells BatchNorm modules how many samples a pass has of a stream, and whether each is normalised by itself."""
    for module in modules:
        if isinstance(module, _Gathered):
            module.stream_rows, module.by_stream = rows, by_stream


def gather_batch_norm(module: nn.Module) -> nn.Module:
    """Gives every BatchNorm in `module` statistics over all ranks, in place. Names and state stay as they are."""
    for child in module.modules():
        if type(child) in _GATHERED:
            child.__class__ = _GATHERED[type(child)]
    return module
