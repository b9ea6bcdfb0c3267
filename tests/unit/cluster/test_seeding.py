import numpy as np
import pytest
from sklearn.cluster import kmeans_plusplus

from sslscale.cluster import seeding
from sslscale.cluster.lloyd import ArrayRows
from sslscale.cluster.seeding import _reduce, initial_state


@pytest.fixture
def candidates():
    generator = np.random.default_rng(0)
    centres = 5 * generator.normal(size=(30, 8)) + 100  # far from the origin
    x = centres[generator.integers(0, 30, 400)] + generator.normal(size=(400, 8))
    return x.astype(np.float32), generator.integers(1, 50, 400).astype(float)


def left(x, weights, centroids):
    return weights @ ((x[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2).min(axis=1)


def test_candidates_are_reduced_as_well_as_by_scikit_learn(candidates):
    x, weights = candidates
    ours = [left(x, weights, _reduce(x, weights, 30, seed)) for seed in range(10)]
    theirs = [
        left(x, weights, kmeans_plusplus(x, 30, sample_weight=weights, random_state=seed)[0]) for seed in range(10)
    ]
    assert np.mean(ours) < 1.05 * np.mean(theirs)


def test_distances_that_are_not_kept_give_the_same(candidates, monkeypatch):
    x, weights = candidates
    kept = _reduce(x, weights, 30, 1)
    assert len(np.unique(kept, axis=0)) == 30
    monkeypatch.setattr(seeding, "MATRIX_BYTES", 0)
    np.testing.assert_array_equal(_reduce(x, weights, 30, 1), kept)


def test_several_are_chosen_at_once_where_clusters_are_very_many(candidates, monkeypatch):
    x, weights = candidates
    one = [left(x, weights, _reduce(x, weights, 60, seed)) for seed in range(5)]
    monkeypatch.setattr(seeding, "MOST_CHOICES", 20)  # three at once
    several = [_reduce(x, weights, 60, seed) for seed in range(5)]
    assert all(len(np.unique(found, axis=0)) == 60 for found in several)
    assert np.mean([left(x, weights, found) for found in several]) < 1.5 * np.mean(one)
    assert len(_reduce(np.repeat(x[:3], 30, axis=0), np.ones(90), 60, 0)) == 60


def test_candidates_that_coincide(candidates):
    x, weights = candidates
    few = np.repeat(x[:3], 5, axis=0)
    assert len(np.unique(_reduce(few, weights[:15], 6, 0), axis=0)) == 3


@pytest.mark.parametrize("many", [False, True])
def test_auto_is_kmeans_parallel_for_many_clusters(candidates, monkeypatch, many):
    monkeypatch.setattr(seeding, "MANY_CLUSTERS", 20 if many else 21)
    rows = ArrayRows(candidates[0], "l2")
    auto, named = (initial_state(rows, 20, init, 2, 0) for init in ("auto", "kmeans||" if many else "k-means++"))
    np.testing.assert_array_equal(auto.centroids, named.centroids)
