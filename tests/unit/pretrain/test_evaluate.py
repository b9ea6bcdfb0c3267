"""Probes and the verdict of an evaluation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tars import encode_png, write_tar

from sslscale.config import CollapseConfig
from sslscale.pretrain.evaluate import Evaluator, is_healthy, probe
from sslscale.shards.dataset import open_shards
from sslscale.shards.readers import ImageReader


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


def test_samples_whose_labels_are_names_are_read_as_samples_without_labels(tmp_path):
    image = encode_png(np.zeros((4, 4), np.uint8))
    members = [("a.cls", b"cat"), ("a.png", image), ("b.cls", b"2"), ("b.png", image), ("c.png", image)]
    write_tar(tmp_path / "a.tar", members)
    inputs, labels = Evaluator._read(SimpleNamespace(reader=ImageReader(1, None)), open_shards(str(tmp_path)), 10)
    assert inputs.shape == (3, 1, 4, 4) and labels.tolist() == [-1, 2, -1]


def test_views_are_compared_of_samples_from_all_over_the_dataset():
    seen = []
    backbone = SimpleNamespace(augmented=lambda inputs, random, recipe: seen.append(inputs) or inputs)
    own = SimpleNamespace(
        inputs=torch.arange(250, dtype=torch.uint8).repeat_interleave(4)[:, None],  # a thousand, in order
        device=torch.device("cpu"),
        config=SimpleNamespace(views=None),
        _features=lambda objective, views: views,
    )
    Evaluator._views(own, SimpleNamespace(backbone=backbone))
    assert len(seen[0]) == 256 and len(seen[0].unique()) > 200
