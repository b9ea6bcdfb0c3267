"""Soft assignments of all samples at once, with as much balance between the clusters as is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

CONVERGED = 1e-9  # change of the potentials, in nats


def transport(log_kernel: Tensor, log_prior: Tensor, balance: float = 1.0, iterations: int = 200) -> Tensor:
    """log Q (..., n, K), of which each row sums to 1.

    With C = -log_kernel (..., n, K) it minimises sum_ik Q_ik (C_ik + log Q_ik), its columns held at n times the prior
    exp(log_prior) (..., K) by balance 1 (Sinkhorn: Cuturi 2013, https://arxiv.org/abs/1306.0895), left free by 0, and
    pulled there in between (Chizat et al. 2018, https://arxiv.org/abs/1607.05816: balance = tau / (tau + 1)).
    """
    log_count = torch.tensor(log_kernel.shape[-2], dtype=log_kernel.dtype, device=log_kernel.device).log()
    v = torch.zeros_like(log_prior.expand(*log_kernel.shape[:-2], -1))  # (..., K), the columns' potential
    for _ in range(iterations):
        log_column = (log_kernel + v[..., None, :]).log_softmax(dim=-1).logsumexp(dim=-2) - log_count
        before, v = v, balance * (v + log_prior - log_column)
        if (v - before).abs().max() < CONVERGED:
            break
    return (log_kernel + v[..., None, :]).log_softmax(dim=-1)
