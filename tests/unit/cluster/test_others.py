"""Clusterers that look at all rows at once."""

import numpy as np
import pytest
from sklearn.cluster import SpectralClustering
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from sslscale.cluster.others import MAX_ROWS, SPECTRAL_NEIGHBOURS, check_rows, fit_labels
from sslscale.errors import UserError


@pytest.mark.parametrize("rows", [300, 1797])
def test_spectral_clusters_are_scikit_learns(rows):
    x = load_digits().data[:rows].astype(np.float32)
    theirs = SpectralClustering(
        10, affinity="nearest_neighbors", n_neighbors=SPECTRAL_NEIGHBOURS + 1, n_init=10, random_state=0
    )
    assert adjusted_rand_score(theirs.fit_predict(x), fit_labels(x, "spectral", 10, 10, seed=0)) > 0.99


@pytest.mark.parametrize("rows", [90, 1000])
@pytest.mark.filterwarnings("error")
def test_spectral_finds_the_parts_of_a_graph_in_parts(rows):
    truth = np.arange(rows) % 3
    x = (100 * truth[:, None] + np.random.default_rng(0).standard_normal((rows, 4))).astype(np.float32)
    assert adjusted_rand_score(truth, fit_labels(x, "spectral", 3, 10, seed=0)) == 1


def test_spectral_of_as_many_clusters_as_rows():
    x = np.eye(6, dtype=np.float32)
    assert len(set(fit_labels(x, "spectral", 6, 3, seed=0))) == 6


@pytest.mark.parametrize("method", MAX_ROWS)
def test_samples_too_many_and_too_few_are_refused(method):
    check_rows(method, 2)
    check_rows(method, MAX_ROWS[method])
    for rows in (1, MAX_ROWS[method] + 1):
        with pytest.raises(UserError, match=f"cluster.method={method}"):
            check_rows(method, rows)
