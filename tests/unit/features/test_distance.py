import numpy as np
import pytest

from sslscale.features.distance import prepare, to_distance, to_objective


def test_squared_l2_of_prepared_rows_becomes_the_metric():
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])
    squared = {metric: ((prepare(x, metric) - prepare(y, metric)) ** 2).sum(axis=1) for metric in ("l2", "cosine")}
    assert to_distance(squared["l2"], "l2")[0] == pytest.approx(np.hypot(3, 2))
    assert to_distance(squared["cosine"], "cosine")[0] == pytest.approx(1 - 0.8)
    assert to_objective(squared["l2"].sum(), "l2") == pytest.approx(13)
    assert to_objective(squared["cosine"].sum(), "cosine") == pytest.approx(0.2)


def test_prepare_keeps_precision_and_zero_rows():
    assert prepare(np.ones((1, 2), np.float16), "l2").dtype == np.float32
    assert prepare(np.ones((1, 2), np.float64), "cosine").dtype == np.float64
    np.testing.assert_array_equal(prepare(np.zeros((1, 2), np.float32), "cosine"), [[0, 0]])
