import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from sslscale.features import FeatureSet, FeatureStore
from sslscale.index import exact
from sslscale.index.exact import ArrayReference, SetReference, exact_knn


@pytest.mark.parametrize(("metric", "theirs"), [("l2", "euclidean"), ("cosine", "cosine")])
def test_agrees_with_scikit_learn_over_blocks(metric, theirs, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_ROWS", 37)
    monkeypatch.setattr(exact, "QUERY_ROWS", 20)
    generator = np.random.default_rng(0)
    x, queries = generator.normal(size=(200, 6)).astype(np.float32), generator.normal(size=(50, 6)).astype(np.float32)
    distances, ids = exact_knn(queries, np.full(50, -1), ArrayReference(x), 7, metric)
    expected, expected_ids = NearestNeighbors(n_neighbors=7, metric=theirs).fit(x).kneighbors(queries)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ids, expected_ids)


def test_the_own_row_is_left_out_by_id_and_its_duplicates_stay():
    x = np.array([[1.0, 1.0]] * 6 + [[4.0, 5.0]], dtype=np.float32)  # six equal rows
    distances, ids = exact_knn(x, np.arange(7), ArrayReference(x), 3, "l2")
    assert (ids != np.arange(7)[:, None]).all()
    np.testing.assert_array_equal(distances[:6], 0)
    assert all(set(row) <= set(range(6)) for row in ids)
    np.testing.assert_array_equal(distances[6], 5)
    assert (np.diff(ids, axis=1) > 0).all()  # equal distances are ordered by id


def test_equal_vectors_far_from_the_origin_are_at_zero():
    x = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32) + 300
    distances, ids = exact_knn(x, np.full(100, -1), ArrayReference(x), 1, "l2")
    np.testing.assert_array_equal(ids[:, 0], np.arange(100))
    np.testing.assert_array_equal(distances, 0)


def test_parts_of_a_set_are_searched_by_row_id(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)
    store = FeatureStore.create(tmp_path, dim=4, dtype="fp16", normalized=False, backbone="b0")
    bounds = [(0, 11), (11, 11), (11, 30)]
    store.commit(
        store.write_part(part, x[a:b], [str(row) for row in range(a, b)], ["s"] * (b - a), range(b - a))
        for part, (a, b) in enumerate(bounds)
    )
    features = FeatureSet({"train": FeatureStore.open(tmp_path)})
    positions = np.arange(30)
    distances, ids = exact_knn(x, features.row_ids(positions), SetReference(features), 12, "l2")
    expected, expected_ids = exact_knn(x, positions, ArrayReference(x), 12, "l2")
    np.testing.assert_array_equal(ids, features.row_ids(expected_ids))
    np.testing.assert_array_equal(distances, expected)


def test_few_candidates_are_compared_at_a_time(monkeypatch):
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    expected = exact_knn(x, np.arange(50), ArrayReference(x), 5, "cosine")
    sizes, take = [], ArrayReference.take

    def taken(self, ids):
        sizes.append(len(ids))
        return take(self, ids)

    monkeypatch.setattr(ArrayReference, "take", taken)
    monkeypatch.setattr(exact, "RESCORE_BYTES", 4 * 6 * 8 * 7)  # seven queries with k + 1 candidates each
    for ours, theirs in zip(exact_knn(x, np.arange(50), ArrayReference(x), 5, "cosine"), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sizes == [42] * 7 + [6]
