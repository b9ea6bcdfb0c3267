"""Heads on top of a backbone."""

from __future__ import annotations

import itertools

from torch import nn

from sslscale.models.norm import GatheredBatchNorm1d


def mlp(*widths: int, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers of the given widths, with BatchNorm (over all ranks) and ReLU between them.

    `mlp(512, 2048, 128)` is a projector with one hidden layer: (B, 512) -> (B, 128). `last_norm` also normalises the
    output. A layer that BatchNorm follows has no bias.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm if last else norm
        layers.append(nn.Linear(fan_in, fan_out, bias=not normed))
        if normed:
            layers.append(GatheredBatchNorm1d(fan_out))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
