import numpy as np

import sslscale.cluster.tree as tree_module
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
    groups = np.split(np.arange(144), np.cumsum(counts)[:-1])
    tree = Tree.of(parents, centroids, groups, NEAR_GROUPS)
    found = np.empty(len(x), np.int32)
    seen = np.zeros(len(x), int)
    for at, prepared, own in tree.assign(x, "l2", centroids):
        np.testing.assert_array_equal(prepared, rows[at])
        found[at] = own
        seen[at] += 1
    assert (seen == 1).all()
    squared = brute(rows, centroids)
    assert squared[np.arange(len(x)), found].sum() <= 1.01 * squared.min(axis=1).sum()
    assert {len(candidates) for candidates in tree.candidates} == {NEAR_GROUPS * 144 // 12}


def test_candidates_are_the_nearest_to_the_centre_and_all_of_the_group(monkeypatch):
    monkeypatch.setattr(tree_module, "BLOCK_BYTES", 8 * 100 * 3)  # three groups at a time
    centroids = blobs(np.float32)[:100]
    centres = centroids[[0, 10, 20, 30, 40]]
    groups = [np.arange(50), *np.split(np.arange(50, 80), 3), np.arange(80, 100)]
    found = Tree.of(centres, centroids, groups, near=2).candidates
    squared = brute(centres, centroids)
    for group, own, candidates in zip(range(5), groups, found, strict=True):
        others = [at for at in np.argsort(squared[group]).tolist() if at not in own]
        np.testing.assert_array_equal(candidates, np.sort([*own, *others[: max(0, 40 - len(own))]]))


def test_a_tree_with_few_groups_is_exact():
    rows = blobs(np.float32)[:300]
    groups = [np.array([8, 7]), np.array([], dtype=int), np.array([6, 5, 4, 3, 2, 1, 0])]
    tree = Tree.of(rows[:3], rows[:9], groups, NEAR_GROUPS)
    exact = brute(rows, rows[:9]).argmin(axis=1)
    for at, _, own in tree.assign(rows, "l2", rows[:9]):
        np.testing.assert_array_equal(own, exact[at])


def test_a_pass_by_a_tree_of_many_centroids_is_nearly_an_exact_one():
    rows = blobs()
    assert Tree.over(rows[: MIN_CENTROIDS - 1].astype(np.float32)) is None
    centroids = rows[:600].astype(np.float32)
    tree = Tree.over(centroids)
    assert tree is not None and len(tree.candidates) == len(tree.centres) == 24
    assert {len(candidates) for candidates in tree.candidates} == {200} and set(
        np.concatenate(tree.candidates).tolist()
    ) == set(range(600))
    for share in (1.0, 0.3):
        here = nested_sample(len(rows), share, 7)
        weights = np.random.default_rng(2).uniform(size=len(rows))
        wanted = Pass(np.stack([centroids, centroids]), np.full(2, share), [tree, None])
        totals = accumulate(rows, "l2", wanted, weights, seed=7)
        np.testing.assert_allclose(totals.counts.sum(axis=1), weights[here].sum())
        np.testing.assert_allclose(totals.squares[0], totals.squares[1])
        rough, exact = totals.objective(wanted.centroids)
        assert (1 - 1e-12) * exact <= rough <= 1.03 * exact
        labels = np.empty(len(rows[here]), dtype=int)
        for at, x, own in tree.assign(rows, "l2", centroids, here):
            np.testing.assert_array_equal(x, rows[here][at])
            labels[at] = own
        squared = brute(rows[here], centroids)[np.arange(len(labels)), labels]
        np.testing.assert_allclose(rough, weights[here] @ squared, rtol=1e-9)


def test_centroids_without_groups_have_no_tree():
    repeated = np.repeat(np.random.default_rng(0).standard_normal((1, 64), dtype=np.float32), 600, axis=0)
    assert Tree.over(repeated) is None
    assert Tree.over(np.random.default_rng(0).standard_normal((600, 256), dtype=np.float32)) is None
