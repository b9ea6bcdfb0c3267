import numpy as np

from sslscale.cluster.hierarchy import child_counts, num_parents, split
from sslscale.cluster.kernels import Pass, accumulate, nested_sample
from sslscale.cluster.tree import MIN_CENTROIDS, NEAR_GROUPS, Tree, by_group, nearest_group


def blobs(dtype=np.float16):
    generator = np.random.default_rng(0)
    centres = 3 * generator.normal(size=(64, 8))
    return (centres[generator.integers(0, 64, 4000)] + generator.normal(size=(4000, 8))).astype(dtype)


def brute(rows, centroids):
    return ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)


def test_positions_by_group():
    order, starts = by_group(np.array([2, 0, 2, 0, 3]), 5)
    assert order.tolist() == [1, 3, 0, 2, 4] and starts.tolist() == [0, 2, 2, 4, 5, 5]


def test_a_hierarchy_assigns_nearly_as_a_full_search_does():
    x = blobs()
    rows = x.astype(np.float32)
    parents = split(rows, num_parents(144), "l2", "k-means++", 20, 1e-3, seed=0)
    labels = nearest_group(rows, "l2", parents)
    counts = child_counts(np.bincount(labels, minlength=12), 144)
    children = [split(rows[labels == p], n, "l2", "k-means++", 20, 1e-3, seed=0) for p, n in enumerate(counts)]
    centroids = np.concatenate(children)
    tree = Tree(parents, np.arange(144), np.concatenate([[0], np.cumsum(counts)]))
    found = np.empty(len(x), np.int32)
    seen = np.zeros(len(x), int)
    for at, prepared, own in tree.assign(x, "l2", centroids):
        np.testing.assert_array_equal(prepared, rows[at])
        found[at] = own
        seen[at] += 1
    assert (seen == 1).all()
    squared = brute(rows, centroids)
    assert squared[np.arange(len(x)), found].sum() <= 1.01 * squared.min(axis=1).sum()
    near = np.argsort(brute(parents, parents)[0])[:NEAR_GROUPS]
    assert len(tree.candidates(0)) == counts[near].sum()


def test_a_tree_with_few_groups_is_exact():
    rows = blobs(np.float32)[:300]
    tree = Tree(rows[:3], np.array([8, 7, 6, 5, 4, 3, 2, 1, 0]), np.array([0, 2, 2, 9]))
    exact = brute(rows, rows[:9]).argmin(axis=1)
    for at, _, own in tree.assign(rows, "l2", rows[:9]):
        np.testing.assert_array_equal(own, exact[at])


def test_a_pass_by_a_tree_of_many_centroids_is_nearly_an_exact_one():
    rows = blobs()
    assert Tree.over(rows[: MIN_CENTROIDS - 1].astype(np.float32)) is None
    centroids = rows[:600].astype(np.float32)
    tree = Tree.over(centroids)
    assert tree is not None and sorted(tree.order.tolist()) == list(range(600)) and len(tree.centres) == 24
    for share in (1.0, 0.3):
        here = nested_sample(len(rows), share, 7)
        weights = np.random.default_rng(2).uniform(size=len(rows))
        wanted = Pass(np.stack([centroids, centroids]), np.full(2, share), [tree, None])
        totals = accumulate(rows, "l2", wanted, weights, seed=7)
        np.testing.assert_allclose(totals.counts.sum(axis=1), weights[here].sum())
        np.testing.assert_allclose(totals.squares[0], totals.squares[1])
        rough, exact = totals.objective(wanted.centroids)
        assert exact <= rough <= 1.03 * exact
        labels = np.empty(len(rows[here]), dtype=int)
        for at, x, own in tree.assign(rows, "l2", centroids, here):
            np.testing.assert_array_equal(x, rows[here][at])
            labels[at] = own
        squared = brute(rows[here], centroids)[np.arange(len(labels)), labels]
        np.testing.assert_allclose(rough, weights[here] @ squared, rtol=1e-9)


def test_centroids_without_groups_have_no_tree():
    assert Tree.over(np.random.default_rng(0).standard_normal((600, 256), dtype=np.float32)) is None
