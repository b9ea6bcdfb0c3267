import numpy as np

from sslscale.cluster.hierarchy import child_counts


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
