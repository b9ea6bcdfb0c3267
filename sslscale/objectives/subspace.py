"""The leading principal directions of features over a corpus, where an objective's heads start."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_directions(features: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(n, D) -> mean (D,) and directions (dim, D), so scaled that (x - mean) @ directions.T varies by 1 on average.

    Directions beyond D, or where the features do not vary, are 0. Each one's sign makes its largest entry positive.
    """
    x = features.double()
    mean = x.mean(dim=0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    kept = min(dim, x.shape[1])
    values, vectors = values.flip(0)[:kept].clamp(min=0.0), vectors.flip(1)[:, :kept]
    signs = vectors.gather(0, vectors.abs().argmax(dim=0)[None]).sign()
    scale = values.mean().sqrt()
    directions = torch.zeros(dim, x.shape[1], dtype=torch.float64, device=x.device)
    if scale > 0:
        directions[:kept] = (vectors * signs).T / scale
    return mean.to(features.dtype), directions.to(features.dtype)
