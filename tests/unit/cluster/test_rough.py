from __future__ import annotations

import numpy as np
import pytest

from sslscale.cluster import kernels, rough
from sslscale.cluster.kernels import Pass, accumulate
from sslscale.cluster.kmeans import KMeans
from sslscale.cluster.rough import RoughNearestCentroid


def squared(x, centroids):
    return ((x[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_centroid_found_is_about_as_near_as_the_nearest(offset, dtype, monkeypatch):
    monkeypatch.setattr(rough, "TILE_CENTROIDS", 64)
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(1500, 32)) + offset).astype(dtype)
    centroids = x[:200].copy()
    labels = RoughNearestCentroid(centroids)(x)
    assert labels.dtype == np.int32
    all_squared = squared(x, centroids)
    own, least = all_squared[np.arange(len(x)), labels], all_squared.min(axis=1)
    assert (own <= least * (1 + 2**-6) + 0.1).all()  # the sum of 32 rounded products, and their rounded sum
    assert own.sum() <= least.sum() * (1 + 1e-3)
    assert (labels[:200] == np.arange(200)).all()  # distance 0


def test_only_passes_that_need_not_be_exact_are_rough(monkeypatch):
    monkeypatch.setattr(rough, "has_tiles", lambda: True)
    made = []
    monkeypatch.setattr(rough, "RoughNearestCentroid", lambda c: made.append(len(c)) or RoughNearestCentroid(c))
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    exact = accumulate(x, "l2", Pass.of(x[None, :20]))
    assert made == []
    about = accumulate(x, "l2", Pass(x[None, :20], np.ones(1), np.array([False])))
    assert made == [20]
    assert about.objective(x[None, :20])[0] == pytest.approx(exact.objective(x[None, :20])[0], rel=1e-3)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_what_begins_roughly_ends_exactly(metric, monkeypatch):
    """The labels, the objective and the last centroids are those of exact passes."""
    monkeypatch.setattr(rough, "has_tiles", lambda: True)
    monkeypatch.setattr("sslscale.cluster.lloyd.MIN_SAMPLE", 256)
    x = np.random.default_rng(1).normal(size=(6000, 12)).astype(np.float32)
    model = KMeans(10, metric=metric, random_state=0, max_iterations=30, tolerance=0.0).fit(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    all_squared = squared(unit, model.cluster_centers_)
    assert (model.labels_ == all_squared.argmin(axis=1)).mean() > 0.999
    scale = 0.5 if metric == "cosine" else 1
    assert model.inertia_ == pytest.approx(scale * all_squared.min(axis=1).sum(), rel=1e-6)
    assert kernels.NearestCentroid(model.cluster_centers_)(unit).tobytes() == model.labels_.tobytes()
