"""k-means||: what is drawn, and that remembering it between rounds changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from sslscale.cluster import candidates as module
from sslscale.cluster.candidates import Candidates, CandidateSearch
from sslscale.cluster.lloyd import ArrayRows
from sslscale.cluster.seeding import initial_state


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)


def test_draws_are_in_proportion_to_the_squared_distance():
    x = np.repeat(np.array([[0.0], [1.0], [2.0]], dtype=np.float32), 1000, axis=0)
    counts = np.zeros(3)
    for start in range(20):
        found = CandidateSearch().draw(x, "l2", Candidates((np.zeros((1, 1), np.float32),), 1.0, start, 3), 50)
        counts += [(found.rows == value).sum() for value in (0, 1, 2)]
    assert counts[0] == 0 and counts.sum() == 1000
    assert counts[2] / counts[1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_is_remembered_is_what_would_be_found(rows, share):
    rounds = (rows[:1], rows[10:40], rows[50:120])
    remembers = CandidateSearch()
    for count in range(1, 4):
        candidates = Candidates(rounds[:count], share, 7, 30)
        ours = remembers.draw(rows, "l2", candidates, 20, seed=3, name="part")
        fresh = CandidateSearch().draw(rows, "l2", candidates, 20, seed=3, name="part")
        for name, value in vars(ours).items():
            np.testing.assert_array_equal(value, getattr(fresh, name))
    distances = ((ours.rows[:, None] - candidates.joined()) ** 2).sum(axis=2)
    np.testing.assert_array_equal(ours.labels, distances.argmin(axis=1))
    np.testing.assert_allclose(ours.squared, distances.min(axis=1), rtol=1e-5, atol=1e-6)
    weights = remembers.weigh(rows, "l2", candidates, seed=3, name="part")
    assert weights.shape == (101,) and weights.sum() == np.ceil(share * len(rows))


def test_another_restart_forgets(rows):
    search = CandidateSearch()
    search.weigh(rows, "l2", Candidates((rows[:30],), 1.0, 1, 30), name="part")
    other = search.weigh(rows, "l2", Candidates((rows[30:60],), 1.0, 2, 30), name="part")
    np.testing.assert_array_equal(other, CandidateSearch().weigh(rows, "l2", Candidates((rows[30:60],), 1.0, 2, 30)))


def test_another_number_of_clusters_with_the_same_seed_forgets(rows):
    shared = ArrayRows(rows, "l2")
    for number in (20, 50):
        found = initial_state(shared, number, "kmeans||", 1, 0)
        alone = initial_state(ArrayRows(rows, "l2"), number, "kmeans||", 1, 0)
        np.testing.assert_array_equal(found.centroids, alone.centroids)


def test_each_candidate_is_compared_once(rows, monkeypatch):
    seen = []
    original = module.nearly_nearest
    monkeypatch.setattr(
        module,
        "nearly_nearest",
        lambda rows, metric, own, *rest: seen.append(len(own)) or original(rows, metric, own, *rest),
    )
    initial_state(ArrayRows(rows, "l2"), 20, "kmeans||", 1, seed=0)
    assert seen == [1, *[20] * 5]
