import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import davies_bouldin_score

from sslscale.cluster import measures
from sslscale.cluster.measures import (
    clustering_accuracy,
    davies_bouldin,
    imbalance,
    label_measures,
    purity,
    silhouette,
)

LABELS = np.array([7, 7, 7, 3, 3, 9])


def test_accuracy_matches_clusters_to_classes_one_to_one():
    assert clustering_accuracy(LABELS, np.array([2, 2, 2, 0, 0, 1])) == 1
    assert clustering_accuracy(LABELS, np.zeros(6, int)) == pytest.approx(3 / 6)
    assert clustering_accuracy(LABELS, np.array([0, 1, 2, 3, 3, 4])) == pytest.approx(4 / 6)  # 7 keeps one of its three
    greedy_fails = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert clustering_accuracy(greedy_fails, np.array([0, 0, 0, 1, 1, 0, 0, 0, 0])) == pytest.approx(6 / 9)


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
    monkeypatch.setattr(measures, "CHUNK", 3)
    x, assignments = make_blobs(200, 3, centers=8, random_state=0)
    means = np.stack([x[assignments == cluster].mean(axis=0) for cluster in range(8)])
    distances = np.linalg.norm(x - means[assignments], axis=1)
    with_an_empty_one = np.concatenate([means, means[:1]])
    expected = pytest.approx(davies_bouldin_score(x, assignments), rel=1e-6)
    assert davies_bouldin(means, assignments, distances) == expected
    assert davies_bouldin(with_an_empty_one, assignments, distances) == expected
    assert davies_bouldin(means[:1], np.zeros(3, int), np.ones(3)) is None


def test_silhouette_closed_form():
    rows = np.array([[0.0], [0.0], [4.0], [4.0]])
    assert silhouette(rows, np.array([0, 0, 1, 1]), "l2") == 1
    assert silhouette(rows, np.array([0, 1, 0, 1]), "l2") == pytest.approx(-0.5)
    assert silhouette(rows, np.zeros(4, int), "l2") is None
