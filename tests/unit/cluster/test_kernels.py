import numpy as np
import pytest

from sslscale.cluster import kernels
from sslscale.cluster.kernels import (
    Farthest,
    Pass,
    Totals,
    accumulate,
    farthest,
    nearest_centroid,
    nested_sample,
    squared_distances,
)


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(300, 8)).astype(np.float16)


def brute(x, centroids):
    return ((x[:, None].astype(np.float64) - centroids.astype(np.float64)) ** 2).sum(axis=2)


def test_nearest_centroid_over_tiles(rows, monkeypatch):
    monkeypatch.setattr(kernels, "TILE_CENTROIDS", 7)
    centroids = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    labels = nearest_centroid(rows.astype(np.float32), centroids)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, brute(rows, centroids).argmin(axis=1))


def test_ties_go_to_the_lowest_index(monkeypatch):
    centroids = np.array([[5.0], [1.0], [-1.0], [1.0]], dtype=np.float32)
    for tile in (1, 4096):
        monkeypatch.setattr(kernels, "TILE_CENTROIDS", tile)
        assert nearest_centroid(np.array([[0.0], [2.0]], dtype=np.float32), centroids).tolist() == [1, 1]


def test_an_offset_does_not_cost_precision(rows):
    x = rows.astype(np.float32) + 512
    centroids = x[:40] + np.float32(0.25)
    np.testing.assert_array_equal(nearest_centroid(x, centroids), brute(x, centroids).argmin(axis=1))


def test_equal_vectors_are_at_distance_zero(rows):
    x = rows.astype(np.float32) + 1000  # where ||x||^2 - 2 x.c + ||c||^2 cancels
    np.testing.assert_array_equal(squared_distances(x, x[:5], np.zeros(len(x), int) + 3)[3], 0)


def test_totals_are_the_sums_over_the_rows(rows, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 64)
    centroids = np.stack([rows[:4], rows[10:14]]).astype(np.float32)
    weights = np.random.default_rng(2).uniform(size=len(rows))
    totals = accumulate(rows, "l2", Pass.of(centroids), weights)
    for restart in range(2):
        squared = brute(rows, centroids[restart])
        labels = squared.argmin(axis=1)
        for cluster in range(4):
            own = labels == cluster
            expected = (weights[own, None] * rows[own].astype(np.float64)).sum(axis=0)
            np.testing.assert_allclose(totals.sums[restart, cluster], expected, rtol=1e-12)
            assert totals.counts[restart, cluster] == pytest.approx(weights[own].sum())
        assert totals.objective(centroids)[restart] == pytest.approx(weights @ squared.min(axis=1), rel=1e-10)


def test_fp16_totals_are_exact_in_any_order(rows):
    centroids = rows[None, :5].astype(np.float32)
    whole = accumulate(rows, "l2", Pass.of(centroids))
    parts = [accumulate(part, "l2", Pass.of(centroids)) for part in np.array_split(rows, 7)]
    total = Totals.zero(centroids)
    for part in reversed(parts):
        total.add(part)
    np.testing.assert_array_equal(total.sums, whole.sums)
    assert total.squares == whole.squares


def test_farthest_over_blocks(rows, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 32)
    centroids = rows[:3].astype(np.float32)
    expected = np.argsort(-brute(rows, centroids).min(axis=1), kind="stable")[:6]
    found = farthest(rows, "l2", Pass.of(centroids[None]), 6)
    np.testing.assert_array_equal(found.rows, rows[expected])
    np.testing.assert_array_equal(found.labels, brute(rows, centroids).argmin(axis=1)[expected])
    halves = [farthest(half, "l2", Pass.of(centroids[None]), 6) for half in np.array_split(rows, 2)]
    np.testing.assert_array_equal(Farthest.merge(halves, 6).rows, found.rows)


def test_smaller_samples_are_part_of_larger_ones():
    quarter, half = (nested_sample(1001, share, 3) for share in (0.25, 0.5))
    assert len(quarter) == 251 and len(half) == 501 and set(quarter) < set(half)
    assert (np.diff(half) > 0).all()
    assert nested_sample(1001, 1.0, 3) == slice(None)
    assert set(quarter) != set(nested_sample(1001, 0.25, 4))


def test_a_pass_over_a_sample_is_a_pass_over_its_rows(rows):
    centroids = rows[None, :5].astype(np.float32)
    weights = np.random.default_rng(2).uniform(size=len(rows))
    here = nested_sample(len(rows), 0.3, 7)
    part = accumulate(rows, "l2", Pass.of(centroids, 0.3), weights, seed=7)
    alone = accumulate(rows[here], "l2", Pass.of(centroids), weights[here])
    np.testing.assert_array_equal(part.sums, alone.sums)
    assert part.squares == alone.squares


def test_restarts_of_one_pass_may_look_at_different_shares(rows):
    centroids = np.stack([rows[:5], rows[5:10]]).astype(np.float32)
    both = accumulate(rows, "l2", Pass(centroids, np.array([0.5, 1.0]), [None, None]), seed=1)
    for restart, share in enumerate((0.5, 1.0)):
        here = slice(restart, restart + 1)
        alone = accumulate(rows, "l2", Pass.of(centroids[here], share), seed=1)
        np.testing.assert_array_equal(both.sums[restart], alone.sums[0])
        np.testing.assert_array_equal(both.counts[restart], alone.counts[0])
