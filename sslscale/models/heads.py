"""Heads on top of a backbone."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.models.norm import GatheredBatchNorm1d, GatheredBatchNorm2d


def mlp(*widths: int, norm: bool = True, last_norm: bool = False, last_bias: bool = True) -> nn.Sequential:
    """Linear layers of the given widths, with BatchNorm (over all ranks) and ReLU between them.

    `mlp(512, 2048, 128)` is a projector with one hidden layer: (B, 512) -> (B, 128). `last_norm` also normalises the
    output. A layer that BatchNorm follows has no bias: its gradient would be rounding errors, which Adam scales up.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm if last else norm
        layers.append(nn.Linear(fan_in, fan_out, bias=not normed and (last_bias or not last)))
        if normed:
            layers.append(GatheredBatchNorm1d(fan_out))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def image_decoder(feature_dim: int, channels: int, size: int, *, width: int = 64) -> nn.Sequential:
    """Pooled features (B, feature_dim) -> a map (B, channels, size, size).

    A linear layer lays the features out on a grid of at most 7 x 7; then each stage doubles the side and convolves.
    A pooled feature is the bottleneck on purpose: what the decoder needs has to be in what the backbone exports.
    """
    stages = max(0, math.ceil(math.log2(size / 7)))
    side = math.ceil(size / 2**stages)
    layers: list[nn.Module] = [
        nn.Linear(feature_dim, width * side * side),
        nn.Unflatten(1, (width, side, side)),
        GatheredBatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    for stage in range(stages):
        target = size if stage == stages - 1 else side * 2 ** (stage + 1)
        layers += [
            nn.Upsample(size=(target, target), mode="nearest"),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            GatheredBatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


class Prototypes(nn.Linear):
    """Cosines with K trained directions: (B, D) -> (B, K). The weight is normalised where it is used, never in place.

    Computed in the weight's own precision, whatever autocast says: a temperature magnifies the rounding.
    """

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__(dim, num_prototypes, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(F.normalize(z.to(self.weight.dtype), dim=1), F.normalize(self.weight, dim=1))
