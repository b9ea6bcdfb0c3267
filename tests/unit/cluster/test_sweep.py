import numpy as np
import pytest

from sslscale.cluster import KMeans
from sslscale.cluster.others import MAX_ROWS, NOISE, fit_labels, means
from sslscale.cluster.sweep import choose, describe, sample_size
from sslscale.config import ClusterConfig
from sslscale.errors import StageError


def line(number, silhouette, seeds=None, halves=None):
    return {
        "num_clusters": number, "silhouette": silhouette, "stability_seeds": seeds, "stability_halves": halves,
    }  # fmt: skip


def test_the_highest_silhouette_among_the_stable_is_chosen():
    assert choose([line(2, 0.2, 1.0, 1.0), line(3, 0.6, 1.0, 0.98), line(4, 0.9, 0.5, 0.5)]) == 3
    assert choose([line(2, 0.5, None, 0.9), line(3, 0.5, None, 0.92)]) == 2  # a tie
    assert choose([line(2, None), line(5, 0.1)]) == 5  # without any stability


def test_a_number_is_not_chosen_for_a_measure_that_others_do_not_have():
    assert choose([line(500, 0.05, None, 0.3), line(2000, 0.9)]) == 2000
    assert choose([line(2, 0.5, 0.4, 0.9), line(3, 0.4, 0.9, None)]) == 3  # by the seeds, which both have
    assert (
        choose([line(1, None, 1.0, 1.0), line(2, 0.4, 0.8, 0.8), line(3, 0.6, 0.8, 0.8)]) == 3
    )  # one is always stable


def test_the_sample_has_rows_for_the_halves_of_the_largest_number():
    def size(*numbers):
        return sample_size(ClusterConfig(num_clusters=list(numbers), silhouette_samples=2000))

    assert size(5, 10) == 2000 and size(5, 100) == 10_000 and size(2, 10**6) == 2**16


def test_the_true_number_is_found():
    generator = np.random.default_rng(0)
    centres = 6 * np.eye(5, 8)
    x = (centres[generator.integers(0, 5, 600)] + generator.normal(size=(600, 8))).astype(np.float32)
    settings = ClusterConfig(num_init=2, max_iterations=20)
    lines = []
    for number in (3, 5, 9):
        fits = [KMeans(number, num_init=3, random_state=seed).fit(x).cluster_centers_ for seed in (0, 1)]
        lines.append(describe(x, np.stack(fits), 0, 1.0, settings, seed=0))
    assert choose(lines) == 5
    assert lines[1]["stability_halves"] > 0.95 > lines[2]["stability_halves"]
    assert lines[1]["davies_bouldin"] < min(lines[0]["davies_bouldin"], lines[2]["davies_bouldin"])


def test_halves_too_small_for_the_clusters_have_no_stability():
    x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    for number, known in ((1, True), (2, False), (8, False)):  # 5 rows a cluster and half, at least
        halves = describe(x, x[None, :number], 0, 1.0, ClusterConfig(), seed=0)["stability_halves"]
        assert (halves is not None) == known


@pytest.mark.parametrize("offset", [0, 10_000])
@pytest.mark.parametrize("method", MAX_ROWS)
def test_other_clusterers_find_blobs(method, offset):
    generator = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 60)
    x = (8 * np.eye(3, 6)[truth] + generator.normal(size=(180, 6)) + offset).astype(np.float32)
    labels = fit_labels(x, method, 3, 1, seed=0)
    assert labels.dtype == np.int32
    known = labels != NOISE
    assert known.mean() > 0.7
    for cluster in range(3):
        assert len(np.unique(labels[known & (truth == cluster)])) == 1
    centroids = means(x, labels)
    assert centroids.shape == (3, 6) and centroids.dtype == np.float32
    np.testing.assert_allclose(centroids[labels[0]], x[labels == labels[0]].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_nothing_but_noise_is_an_error():
    with pytest.raises(StageError, match="no cluster"):
        fit_labels(np.random.default_rng(0).uniform(size=(12, 30)), "hdbscan", 2, 1, seed=0)
