"""What can embed: the one interface of trained backbones, handcrafted features and a user's own class."""

from __future__ import annotations

from torch import nn


class Embedder(nn.Module):
    """Images (B, C, S, S) in [0, 1] -> features (B, `feature_dim`)."""

    feature_dim: int
