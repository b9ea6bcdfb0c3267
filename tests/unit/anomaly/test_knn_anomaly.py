import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from sslscale.anomaly import KNNAnomaly
from sslscale.anomaly.knn import own_reference_ids
from sslscale.errors import UserError
from sslscale.features import FeatureSet, FeatureStore


@parametrize_with_checks([KNNAnomaly(k=2)])
def test_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def test_scores_are_mean_distances_and_high_is_anomalous():
    generator = np.random.default_rng(0)
    x, queries = generator.normal(size=(100, 3)), generator.normal(size=(20, 3))
    queries[0] += 30
    model = KNNAnomaly(k=4).fit(x)
    scores = model.score_samples(queries)
    expected = NearestNeighbors(n_neighbors=4).fit(x).kneighbors(queries)[0].mean(axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.argmax() == 0


def test_training_rows_are_not_their_own_neighbours():
    x = np.array([[0.0], [0.0], [3.0], [10.0]])
    model = KNNAnomaly(k=2).fit(x)
    np.testing.assert_allclose(model.scores_, [(0 + 3) / 2, (0 + 3) / 2, (3 + 3) / 2, (7 + 10) / 2])
    assert model.neighbors_.tolist()[:3] == [[1, 2], [0, 2], [0, 1]]
    np.testing.assert_allclose(model.score_samples(x[:1]), 0)  # a query that equals two rows finds both


def test_cosine():
    model = KNNAnomaly(k=1, metric="cosine").fit(np.array([[1.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(
        model.score_samples([[5.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), [0, 1 - 0.5**0.5, 1], atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "message"), [({"k": 3}, "1 to 2"), ({"k": 0}, "positive"), ({"metric": "l3"}, "l2")]
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        KNNAnomaly(**{"k": 1, **settings}).fit(np.ones((3, 2)))


def test_a_row_finds_itself_in_a_reference_that_numbers_parts_otherwise(tmp_path):
    stores = {}
    for name in ("a", "b"):
        store = FeatureStore.create(tmp_path / name, dim=1, dtype="fp32", normalized=False, backbone="b0")
        store.commit([store.write_part(0, np.ones((2, 1)), ["x", "y"], ["s"] * 2, [0, 1])])
        stores[name] = store
    scored, reference = FeatureSet(stores), FeatureSet({"b": stores["b"]})
    assert own_reference_ids(scored, 0, reference).tolist() == [-1, -1]
    assert own_reference_ids(scored, 1, reference).tolist() == [0, 1]
