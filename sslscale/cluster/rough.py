"""The nearest centroid by bf16 products, several times faster where the processor has tiles for them (Intel's AMX).

Of two centroids whose squared distances differ by less than about 2^-8 of themselves either may be found: enough for
the iterations that are on their way, not for the last ones. Everywhere else bf16 products are slower than fp32 ones.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

TILE_ROWS, TILE_CENTROIDS = 512, 2048  # of the scores that are held at once: they fit the cache


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies tiles of bf16."""
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16"))


class RoughNearestCentroid:
    """Finds the centroid (K, D) whose squared L2 distance to a row is about the least; see kernels.NearestCentroid.

    The scores are the distances themselves, ||x||^2 - 2 x.c + ||c||^2 with both sides relative to the centroids' mean,
    as one product of [-2 x, ||x||^2, 1] with [c, 1, ||c||^2]: what is rounded to bf16 at the end is then small where
    the distance is. The squares take two columns each, which keeps 16 bits of them. Scores are not negative but for
    rounding, and bf16 numbers that are not negative are in the order of their bits.
    """

    def __init__(self, centroids: np.ndarray) -> None:
        c = torch.tensor(centroids, dtype=torch.float32)
        self.mean = c.mean(dim=0)
        c -= self.mean
        one = torch.ones(len(c), 2, dtype=torch.bfloat16)
        self.table = torch.cat([c.bfloat16(), one, _in_two(c.square().sum(dim=1))], dim=1)  # (K, D + 4)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Labels int32 (n,) of rows (n, D)."""
        rows = torch.tensor(x, dtype=torch.float32) - self.mean
        one = torch.ones(len(rows), 2, dtype=torch.bfloat16)
        rows = torch.cat([(-2 * rows).bfloat16(), _in_two(rows.square().sum(dim=1)), one], dim=1)
        labels = np.zeros(len(x), dtype=np.int32)
        for begin in range(0, len(x), TILE_ROWS):
            here = slice(begin, begin + TILE_ROWS)
            best = np.full(len(x[here]), np.iinfo(np.int16).max)
            for start in range(0, len(self.table), TILE_CENTROIDS):
                scores = (rows[here] @ self.table[start : start + TILE_CENTROIDS].T).view(torch.int16).numpy()
                nearest = scores.argmin(axis=1)
                score = np.take_along_axis(scores, nearest[:, None], axis=1)[:, 0]
                closer = score < best
                labels[here][closer] = nearest[closer] + start
                best[closer] = score[closer]
        return labels


def _in_two(values: Tensor) -> Tensor:
    """(n, 2) bf16 that add up to values (n,), nearly."""
    high = values.bfloat16()
    return torch.stack([high, (values - high.float()).bfloat16()], dim=1)
