"""Probes and the verdict of an evaluation."""

import pytest
import torch

from sslscale.config import CollapseConfig
from sslscale.pretrain.evaluate import is_healthy, probe


def test_probes_find_what_is_separable_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) // 2 % 4
    centres = 4 * torch.eye(4, 6)
    noise = torch.randn(200, 6, generator=generator)
    assert probe(centres[labels] + 0.3 * noise, labels, 5) == {"knn_accuracy": 1.0, "linear_accuracy": 1.0}
    assert all(accuracy < 0.45 for accuracy in probe(noise, labels, 5).values())


@pytest.mark.parametrize(
    ("std", "rank", "healthy"), [(0.5, 8.0, True), (0.001, 8.0, False), (0.5, 1.0, False), (0.01, 1.05, True)]
)
def test_healthy_is_above_both_thresholds(std, rank, healthy):
    assert is_healthy({"feature_std": std, "rankme": rank}, CollapseConfig()) is healthy
