"""Anomaly scores from the all-pairs search rank like the exact ones, and are the exact ones at recall 1."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from sslscale.anomaly.stage import run_anomaly
from sslscale.config import RunConfig
from sslscale.features import FeatureStore
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    store = FeatureStore.create(folder / "embed" / "train", dim=12, dtype="fp32", normalized=False, backbone="b")
    centres, records = 3 * generator.normal(size=(30, 12)), []
    for part in range(3):
        own = generator.integers(0, 30, 1500)
        rows = centres[own] + generator.normal(size=(1500, 12)) * (0.3 + own[:, None] / 30)
        keys = [f"{part}-{row}" for row in range(1500)]
        records.append(store.write_part(part, rows, keys, ["s"] * 1500, range(1500)))
    store.commit(records)
    return RunDir(folder)


def scores(run, name, **settings):
    config = RunConfig.model_validate({"anomaly": {"k": 10, **settings}, "runtime": {"name": "local", "workers": 1}})
    result = run_anomaly(run, config, make_runtime("local"), name=name)
    files = sorted((run.path / "anomaly" / name / "scores").rglob("*.npy"))
    return result, np.concatenate([np.load(file) for file in files])


def test_scores_rank_like_the_exact_ones(run):
    exact_result, exact = scores(run, "exact")
    assert exact_result["method"] == "exact" and exact_result["recall"] == 1
    result, found = scores(run, "lists", method="all_pairs")
    assert result["method"] == "all_pairs" and 0.95 <= result["recall"] < 1
    assert spearmanr(exact, found).statistic >= 0.99
    _, everything = scores(run, "everything", method="all_pairs", wanted_recall=1.0)
    np.testing.assert_array_equal(everything, exact)


def test_many_rows_are_searched_by_lists(run, monkeypatch):
    monkeypatch.setattr("sslscale.anomaly.stage.EXACT_ROWS", 4000)
    assert scores(run, "many")[0]["method"] == "all_pairs"
