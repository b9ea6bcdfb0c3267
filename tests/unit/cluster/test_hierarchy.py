import numpy as np

from sslscale.cluster.hierarchy import NEAR_PARENTS, Tree, by_parent, child_counts, num_parents, split


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


def test_rows_by_parent():
    order, starts = by_parent(np.array([2, 0, 2, 0, 3]), 5)
    assert order.tolist() == [1, 3, 0, 2, 4] and starts.tolist() == [0, 2, 2, 4, 5, 5]


def blobs():
    generator = np.random.default_rng(0)
    centres = 3 * generator.normal(size=(64, 8))
    return (centres[generator.integers(0, 64, 4000)] + generator.normal(size=(4000, 8))).astype(np.float16)


def test_a_tree_assigns_nearly_as_a_full_search_does():
    x = blobs()
    rows = x.astype(np.float32)
    parents = split(rows, num_parents(144), "l2", "k-means++", 20, 1e-3, seed=0)
    labels = ((rows[:, None] - parents) ** 2).sum(axis=2).argmin(axis=1)
    counts = child_counts(np.bincount(labels, minlength=12), 144)
    children = [split(rows[labels == p], n, "l2", "k-means++", 20, 1e-3, seed=0) for p, n in enumerate(counts)]
    tree = Tree(parents, np.concatenate(children), np.concatenate([[0], np.cumsum(counts)]))
    found = np.empty(len(x), np.int32)
    seen = np.zeros(len(x), int)
    for here, prepared, own in tree.assign(x, "l2"):
        np.testing.assert_array_equal(prepared, rows[here])
        found[here] = own
        seen[here] += 1
    assert (seen == 1).all()
    squared = ((rows[:, None] - tree.centroids) ** 2).sum(axis=2)
    assert squared[np.arange(len(x)), found].sum() <= 1.01 * squared.min(axis=1).sum()
    assert len(tree.candidates(0)) == counts[np.argsort(((parents - parents[0]) ** 2).sum(axis=1))[:NEAR_PARENTS]].sum()


def test_a_tree_with_few_parents_is_exact():
    x = blobs()[:300]
    rows = x.astype(np.float32)
    tree = Tree(rows[:3], rows[:9], np.array([0, 2, 2, 9]))
    exact = ((rows[:, None] - rows[:9]) ** 2).sum(axis=2).argmin(axis=1)
    for here, _, own in tree.assign(x, "l2"):
        np.testing.assert_array_equal(own, exact[here])
