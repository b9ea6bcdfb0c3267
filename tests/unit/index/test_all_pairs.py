"""All-pairs search: exact where everything is probed, the wanted recall elsewhere, whatever the workers and kills."""

import numpy as np
import pytest

from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, FeatureStore, open_features
from sslscale.index.all_pairs import all_pairs
from sslscale.index.exact import SetReference, exact_knn
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

DIM, K = 16, 5
SIZES = {"a": (1500, 0, 700), "b": (800,)}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    generator = np.random.default_rng(0)
    centres = 2 * generator.normal(size=(40, DIM))
    for name, sizes in SIZES.items():
        store = FeatureStore.create(folder / "embed" / name, dim=DIM, dtype="fp16", normalized=False, backbone="b")
        records = []
        for part, size in enumerate(sizes):
            rows = centres[generator.integers(0, 40, size)] + generator.normal(size=(size, DIM))
            rows[:20] = rows[20:21]  # more duplicates than neighbours
            keys = [f"{name}-{part}-{row}" for row in range(size)]
            records.append(store.write_part(part, rows, keys, ["s"] * size, range(size)))
        store.commit(records)
    return open_features(RunDir(folder))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("sslscale.index.all_pairs.GROUP_ROWS", 500)


def search(run, features, workers=1, wanted=0.95, metric="cosine", k=K, runtime=None):
    config = RunConfig.model_validate({"runtime": {"name": "local", "workers": workers}})
    runtime = runtime or make_runtime("local")
    return all_pairs(run, config, runtime, features, k=k, metric=metric, wanted_recall=wanted)


def exact(features, metric="cosine", k=K):
    reference = SetReference(features)
    for part in features.parts:
        own = part.number << 32 | np.arange(part.rows, dtype=np.int64)
        yield exact_knn(features.block(part.number), own, reference, k, metric)


def outputs(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.npy"))}


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_probing_everything_is_exact_search(features, tmp_path, metric):
    found = search(RunDir(tmp_path), features, wanted=1.0, metric=metric)
    for part, (distances, ids) in zip(features.parts, exact(features, metric), strict=True):
        own_distances, own_ids = found.block(part.number)
        np.testing.assert_array_equal(own_distances, distances)
        tied = distances == distances[:, -1:]  # of equally far rows either may be the last
        np.testing.assert_array_equal(np.where(tied, 0, own_ids), np.where(tied, 0, ids))


def test_the_wanted_recall_is_reached_without_probing_everything(features, tmp_path):
    found = search(RunDir(tmp_path), features, wanted=0.9)
    result = found.result
    assert 1 < result["nprobe"] < result["num_lists"] // 2 and result["recall"] >= 0.9
    hits = [
        len(np.intersect1d(own, true)) / K
        for part, (_, ids) in zip(features.parts, exact(features), strict=True)
        for own, true in zip(found.block(part.number)[1][20:], ids[20:], strict=True)
    ]
    assert np.mean(hits) >= 0.9
    for part in features.parts:
        distances, ids = found.block(part.number)
        assert ids.shape == distances.shape == (part.rows, K) and (np.diff(distances, axis=1) >= 0).all()
        assert not (ids == (part.number << 32 | np.arange(part.rows))[:, None]).any()
    assert not (found.path / "work").exists()


class Killed(BaseException):
    pass


class DyingRuntime:
    def __init__(self, dies_at=None):
        self.dies_at, self.yielded = dies_at, 0

    def pool(self, worker, setup, workers, resources=None):
        outer = self

        class Pool:
            def __enter__(self):
                self.worker = worker(**setup)
                return self

            def __exit__(self, *exc):
                pass

            def map(self, method, items, broadcast=None):
                for index, item in enumerate(items):
                    if outer.yielded == outer.dies_at:
                        raise Killed
                    outer.yielded += 1
                    yield index, getattr(self.worker, method)(item, broadcast)

        return Pool()


def test_killed_at_any_item_and_with_other_workers_the_bytes_are_the_same(features, tmp_path):
    counting = DyingRuntime()
    expected = search(RunDir(tmp_path / "whole"), features, runtime=counting)
    assert counting.yielded >= 4 + 5 + 5 + 4
    for dies_at in range(0, counting.yielded, 6):
        run = RunDir(tmp_path / f"killed-{dies_at}")
        with pytest.raises(Killed):
            search(run, features, runtime=DyingRuntime(dies_at))
        resumed = DyingRuntime()
        search(run, features, runtime=resumed)
        assert resumed.yielded == counting.yielded - dies_at
        assert outputs(run.path) == outputs(expected.path.parent.parent)
    two = search(RunDir(tmp_path / "two"), features, workers=2)
    assert outputs(two.path) == outputs(expected.path)
    again = DyingRuntime(dies_at=0)
    search(RunDir(tmp_path / "two"), features, runtime=again)


def test_rows_whose_lists_hold_too_few_are_searched_everywhere(tmp_path):
    store = FeatureStore.create(tmp_path / "f", dim=2, dtype="fp32", normalized=False, backbone="b")
    rows = np.concatenate([np.eye(2)[[0] * 60], np.eye(2)[[1] * 3]]) + np.random.default_rng(0).normal(0, 1e-3, (63, 2))
    store.commit([store.write_part(0, rows, [str(i) for i in range(63)], ["s"] * 63, range(63))])
    features = FeatureSet({"f": store})
    found = search(RunDir(tmp_path / "run"), features, wanted=0.5, k=8, metric="l2")
    [(_, ids)] = exact(features, "l2", 8)
    np.testing.assert_array_equal(found.block(0)[1][60:], ids[60:])


def test_another_set_under_the_same_name_is_refused(features, tmp_path):
    run = RunDir(tmp_path)
    search(run, features)
    with pytest.raises(UserError, match="k: 5 -> 4"):
        search(run, features, k=4)
