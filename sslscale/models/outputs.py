"""What of a backbone becomes the feature: its pooled output or another one, and a projection of any of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslscale.models.base import Embedder, Encoder
from sslscale.shards.readers import Reader


class Output(Embedder):
    """`cls`, `tokens_mean` or `layer:K` of an encoder: see its `output_dim`."""

    def __init__(self, encoder: Encoder, output: str) -> None:
        super().__init__()
        self.encoder, self.output = encoder, output
        self.feature_dim = encoder.output_dim(output)

    def reader(self, channels: int | None, size: int | None) -> Reader:
        return self.encoder.reader(channels, size)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder.take(inputs, self.output)


class Projected(Embedder):
    """(x - mean) @ components, of another embedder's features."""

    def __init__(self, embedder: Embedder, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.embedder = embedder
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.feature_dim = components.shape[1]

    def reader(self, channels: int | None, size: int | None) -> Reader:
        return self.embedder.reader(channels, size)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.embedder(inputs).float() - self.mean) @ self.components


def fit_pca(x: np.ndarray, dim: int) -> np.ndarray:
    """The mean and the `dim` leading principal directions of x (n, D): fp32 (1 + dim, D)."""
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    directions = np.linalg.eigh((x - mean).T @ (x - mean))[1][:, ::-1][:, :dim]
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(dim)])  # eigh leaves them open
    return np.concatenate([mean[None], (directions * signs).T]).astype(np.float32)


def project(embedder: Embedder, file: Path) -> Projected:
    """`embedder` followed by the projection that `fit_pca` gave."""
    rows = torch.from_numpy(np.load(file, allow_pickle=False))
    return Projected(embedder, rows[0], rows[1:].T.contiguous())
