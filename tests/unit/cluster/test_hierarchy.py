import numpy as np

from sslscale.cluster.hierarchy import child_counts, moved_together
from sslscale.cluster.lloyd import ArrayRows


def test_children_are_in_proportion():
    assert child_counts(np.array([100, 200, 700]), 10).tolist() == [1, 2, 7]
    assert child_counts(np.array([1, 0, 999]), 10).tolist() == [1, 0, 9]  # one for every parent that has rows
    assert child_counts(np.array([3, 5, 2]), 10).tolist() == [3, 5, 2]  # none has more than it has rows
    generator = np.random.default_rng(0)
    for _ in range(50):
        sizes = generator.integers(0, 40, 12)
        total = int(generator.integers((sizes > 0).sum(), sizes.sum() + 1))
        counts = child_counts(sizes, total)
        assert counts.sum() == total and (counts <= sizes).all() and ((counts > 0) == (sizes > 0)).all()


def test_balanced_children_are_as_many_for_each_parent():
    assert child_counts(np.array([100, 200, 700]), 9, balanced=True).tolist() == [3, 3, 3]
    assert child_counts(np.array([1, 0, 999]), 10, balanced=True).tolist() == [1, 0, 9]


def test_children_move_together_and_one_without_rows_shares_those_of_its_largest_sibling():
    generator = np.random.default_rng(0)
    places = np.array([[0, 0], [4, 0], [100, 0], [104, 0]], np.float32)
    x = places[generator.integers(0, 4, 4000)] + generator.normal(scale=0.3, size=(4000, 2)).astype(np.float32)
    far = np.array([[0.5, 0.2], [50, 1e4], [4.2, 0], [100.5, 0], [103, 1]], np.float32)  # nothing is near the second
    counts = np.array([3, 2])
    centroids = far
    for relaxation in (1.6, 1.0, 1.0):
        centroids = moved_together(ArrayRows(x, "l2"), centroids, counts, "l2", relaxation)
    squared = ((x[:, None] - centroids) ** 2).sum(axis=2)
    assert np.bincount(squared.argmin(axis=1), minlength=5).min() > 100
    np.testing.assert_allclose(centroids[3:], places[2:], atol=0.1)
