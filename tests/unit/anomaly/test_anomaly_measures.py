import numpy as np
import pytest

from sslscale.anomaly.measures import anomaly_measures

SCORES = np.array([0.9, 0.8, 0.3, 0.1])


def test_closed_forms():
    assert anomaly_measures(SCORES, np.array([5, 5, 0, 0]), [0]) == {"auroc": 1, "average_precision": 1}
    assert anomaly_measures(SCORES, np.array([0, 0, 5, 5]), [0])["auroc"] == 0
    mixed = anomaly_measures(SCORES, np.array([5, 0, 5, 1]), [0, 1])
    assert mixed["auroc"] == pytest.approx(3 / 4)
    assert mixed["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert anomaly_measures(np.ones(4), np.array([5, 0, 5, 0]), [0])["auroc"] == 0.5


@pytest.mark.parametrize(
    ("labels", "normal"), [(None, [0]), (np.zeros(4), None), (np.zeros(4), [0]), (np.zeros(4), [1])]
)
def test_null_where_there_is_nothing_to_measure(labels, normal):
    assert anomaly_measures(SCORES, labels, normal) == {"auroc": None, "average_precision": None}
