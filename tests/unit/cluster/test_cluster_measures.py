import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, davies_bouldin_score, normalized_mutual_info_score

from sslscale.cluster import measures
from sslscale.cluster.measures import (
    Tally,
    davies_bouldin,
    imbalance,
    label_measures,
    silhouette,
)


def accuracy(labels, assignments):
    return label_measures(labels, assignments)["acc"]


def purity(labels, assignments):
    return label_measures(labels, assignments)["purity"]


LABELS = np.array([7, 7, 7, 3, 3, 9])


def test_accuracy_matches_clusters_to_classes_one_to_one():
    assert accuracy(LABELS, np.array([2, 2, 2, 0, 0, 1])) == 1
    assert accuracy(LABELS, np.zeros(6, int)) == pytest.approx(3 / 6)
    assert accuracy(LABELS, np.array([0, 1, 2, 3, 3, 4])) == pytest.approx(4 / 6)  # 7 keeps one of its three
    greedy_fails = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert accuracy(greedy_fails, np.array([0, 0, 0, 1, 1, 0, 0, 0, 0])) == pytest.approx(6 / 9)


def test_purity_lets_clusters_share_a_class():
    assert purity(LABELS, np.array([0, 1, 2, 3, 3, 4])) == 1
    assert purity(LABELS, np.zeros(6, int)) == pytest.approx(0.5)


def test_label_measures_closed_forms():
    perfect = label_measures(LABELS, np.array([2, 2, 2, 0, 0, 1]))
    assert perfect == {"acc": 1, "nmi": pytest.approx(1), "ari": pytest.approx(1), "purity": 1}
    crossed = label_measures(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert crossed == {"acc": 0.5, "nmi": pytest.approx(0, abs=1e-12), "ari": pytest.approx(-0.5), "purity": 0.5}
    assert set(label_measures(None, LABELS).values()) == {None}


def test_imbalance():
    assert imbalance(np.array([5, 5, 5, 5])) == 1
    assert imbalance(np.array([20, 0, 0, 0])) == 4


def test_davies_bouldin_is_scikit_learns_at_the_means(monkeypatch):
    monkeypatch.setattr(measures, "CHUNK_BYTES", 200)
    x, assignments = make_blobs(200, 3, centers=8, random_state=0)
    means = np.stack([x[assignments == cluster].mean(axis=0) for cluster in range(8)])
    distances = np.linalg.norm(x - means[assignments], axis=1)
    with_an_empty_one = np.concatenate([means, means[:1]])
    expected = pytest.approx(davies_bouldin_score(x, assignments), rel=1e-6)
    assert davies_bouldin(means, tallied(8, assignments, distances)) == expected
    assert davies_bouldin(with_an_empty_one, tallied(9, assignments, distances)) == expected
    assert davies_bouldin(means[:1], tallied(1, np.zeros(3, int), np.ones(3))) is None
    monkeypatch.setattr(measures, "MOST_PAIRED", 7)
    assert davies_bouldin(means, tallied(8, assignments, distances)) is None


def tallied(num_clusters, assignments, distances, labels=None):
    tally = Tally(num_clusters)
    tally.add(assignments, distances, labels)
    return tally


@pytest.mark.parametrize("clusters", [1, 3, 12])
def test_measures_are_scikit_learns_in_one_piece_and_in_many(clusters):
    generator = np.random.default_rng(clusters)
    labels = generator.integers(0, 5, 400) * 10 - 7
    assignments = np.where(generator.random(400) < 0.7, labels % clusters, generator.integers(0, clusters, 400))
    distances = generator.random(400)
    whole = tallied(clusters + 1, assignments, distances, labels)  # one is empty
    many = Tally(clusters + 1)
    for rows in np.array_split(np.arange(400), 7):
        many = many.merged(tallied(clusters + 1, assignments[rows], distances[rows], labels[rows]))
    assert many.label_measures() == whole.label_measures() == label_measures(labels, assignments)
    np.testing.assert_array_equal(many.sizes, whole.sizes)
    found = whole.label_measures()
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, assignments), abs=1e-12)
    assert found["ari"] == pytest.approx(adjusted_rand_score(labels, assignments), abs=1e-12)


def test_what_a_tally_holds_grows_with_the_pairs_of_class_and_cluster_that_occur(monkeypatch):
    monkeypatch.setattr(measures, "PENDING", 10)
    many, labels = 10**6, np.arange(1000) - 500
    tally = Tally(many)
    for turn in range(20):
        tally.add(np.arange(1000) * 1000 + turn % 2, np.zeros(1000), labels)
        assert sum(own.size for own in tally._counts) <= 3 * 2 * 2000
    classes, clusters, counts = tally.merged(tally).counts
    np.testing.assert_array_equal(classes, np.repeat(labels, 2))
    np.testing.assert_array_equal(clusters, np.arange(0, many, 1000)[:, None].repeat(2, axis=1).ravel() + [0, 1] * 1000)
    assert (counts == 20).all()
    found = tally.label_measures()
    assert found["acc"] == 0.5 and found["purity"] == 1 and found["nmi"] > 0.9
    monkeypatch.setattr(measures, "MOST_MATCHED", 1000 * 2000 - 1)
    assert tally.label_measures() == {**found, "acc": None}


def test_rows_without_labels_among_others_leave_no_measure_against_labels():
    some = tallied(2, np.array([0, 1]), np.zeros(2), np.array([0, 1]))
    assert set(some.merged(tallied(2, np.array([0, 1]), np.zeros(2))).label_measures().values()) == {None}


def test_silhouette_closed_form():
    rows = np.array([[0.0], [0.0], [4.0], [4.0]])
    assert silhouette(rows, np.array([0, 0, 1, 1]), "l2") == 1
    assert silhouette(rows, np.array([0, 1, 0, 1]), "l2") == pytest.approx(-0.5)
    assert silhouette(rows, np.zeros(4, int), "l2") is None
