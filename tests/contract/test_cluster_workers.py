"""K-means over a store: workers, runtimes, and a kill at any iteration change no bit, on every step of the schedule."""

import json

import numpy as np
import pytest

from sslscale import storage
from sslscale.cluster import lloyd, ranges, tree
from sslscale.cluster.kernels import Pass
from sslscale.cluster.kmeans import KMeansWorker, PoolRows
from sslscale.cluster.stage import run_cluster
from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureStore, open_features
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

DIM, CLUSTERS, PART_ROWS, PARTS = 16, 40, 1500, 5


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Small data that goes through the schedule of large data; the workers are only told what to look at."""
    sizes = {"SAMPLE_PER_CLUSTER": 32, "FIRST_PER_CLUSTER": 8, "MIN_SAMPLE": 300}
    for name, value in sizes.items():
        monkeypatch.setattr(lloyd, name, value)
    generator = np.random.default_rng(0)
    centres = 3 * generator.normal(size=(CLUSTERS, DIM))
    parts = [
        centres[generator.integers(0, CLUSTERS, PART_ROWS)] + generator.normal(size=(PART_ROWS, DIM))
        for _ in range(PARTS)
    ]
    write_store(tmp_path, parts)
    return RunDir(tmp_path)


def write_store(folder, parts):
    store = FeatureStore.create(
        folder / "embed/train", dim=parts[0].shape[1], dtype="fp16", normalized=False, backbone="b"
    )
    records = []
    for part, rows in enumerate(parts):
        keys = [f"{part}-{row}" for row in range(len(rows))]
        records.append(store.write_part(part, rows, keys, ["s"] * len(rows), range(len(rows))))
    store.commit(records)


def config(workers, **settings):
    cluster = {"num_clusters": CLUSTERS, "num_init": 2, "init": "kmeans||", "max_iterations": 8, **settings}
    return RunConfig.model_validate({"cluster": cluster, "runtime": {"name": "local", "workers": workers}})


def outputs(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.npy"))}


def test_hierarchical(run):
    settings = {"num_clusters": 150, "method": "hierarchical", "init": "k-means++"}
    runtime = make_runtime("local")
    result = run_cluster(run, config(1, **settings), runtime, name="one")
    assert result["num_clusters"] == len(result["sizes"]) == 150 and result["num_parents"] == 12
    assert result["distances_per_row"] <= 4 * (12 + 150) and sum(result["sizes"]) == PARTS * PART_ROWS
    flat = run_cluster(run, config(1, num_clusters=150, num_init=1), runtime, name="flat")
    assert result["objective"] <= 1.06 * flat["objective"]
    assert run_cluster(run, config(2, **settings), runtime, name="two") == result
    assert outputs(run.path / "cluster/two") == outputs(run.path / "cluster/one")


def test_balanced_clusters_spread_over_what_the_rows_cover(tmp_path):
    """A square whose left half has twenty times the rows of its right half."""
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(42_000, 2)) * [1, 2] + (np.arange(42_000) >= 40_000)[:, None] * [1, 0]
    x = x[generator.permutation(len(x))].astype(np.float32)
    write_store(tmp_path, [x[:20_000], x[20_000:]])
    shares, runtime = {}, make_runtime("local")
    for balanced in (False, True):
        settings = {"num_clusters": 100, "method": "hierarchical", "balanced": balanced, "num_init": 1}
        folder, name = RunDir(tmp_path), f"balanced-{balanced}"
        result = run_cluster(folder, config(1, **settings), runtime, name=name)
        centroids = np.load(tmp_path / "cluster" / name / "centroids.npy")
        assert len(centroids) == 100 and sum(result["sizes"]) == len(x)
        shares[balanced] = (centroids[:, 0] > 1).mean()
    assert shares[False] < 0.15 and shares[True] > 0.25
    again = run_cluster(folder, config(2, **settings), runtime, name="again")
    assert again == result and outputs(tmp_path / "cluster/again") == outputs(tmp_path / "cluster" / name)


def test_local_workers(run):
    runtime = make_runtime("local")
    results = [run_cluster(run, config(workers), runtime, name=f"w{workers}") for workers in (1, 4)]
    assert len(results[0]["schedule"]) >= 4 and results[0]["schedule"][0]["share"] < 1
    logged = (run.path / "cluster/w1/metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line, parse_constant=pytest.fail)["share"] for line in logged]
    assert shares == sorted(shares) and shares[0] < shares[-1] == 1
    expected = outputs(run.path / "cluster/w1")
    assert len(expected) == 1 + 2 * PARTS
    assert results[1] == results[0]  # two workers: see test_feature_stages
    assert outputs(run.path / "cluster/w4") == expected


@pytest.mark.ray
def test_ray_workers(run, ray_runtime):
    local = run_cluster(run, config(1), make_runtime("local"), name="local")
    assert run_cluster(run, config(2), ray_runtime, name="ray") == local
    assert outputs(run.path / "cluster/ray") == outputs(run.path / "cluster/local")


def test_sums_by_ranges_of_centroids_are_those_by_parts(run, monkeypatch):
    runtime = make_runtime("local")
    expected = run_cluster(run, config(1), runtime, name="parts")
    monkeypatch.setattr(ranges, "RANGE_BYTES", 8 * DIM * 7)  # 7 centroids: 6 ranges a restart
    by_range, passes = PoolRows._totals_by_range, []
    monkeypatch.setattr(PoolRows, "_totals_by_range", lambda rows, wanted: passes.append(1) or by_range(rows, wanted))
    assert run_cluster(run, config(2), runtime, name="ranges") == expected
    assert len(passes) >= expected["iterations"]
    assert outputs(run.path / "cluster/ranges") == outputs(run.path / "cluster/parts")


@pytest.mark.ray
def test_iterations_by_groups_of_centroids(run, ray_runtime, monkeypatch):
    monkeypatch.setattr(lloyd, "FIRST_PER_CLUSTER", 2)
    over, trees = tree.Tree.over.__func__, []
    monkeypatch.setattr(tree.Tree, "over", classmethod(lambda cls, own: trees.append(over(cls, own)) or trees[-1]))
    many, local = {"num_clusters": 600}, make_runtime("local")
    one = run_cluster(run, config(1, **many), local, name="one")
    assert [step["exact"] for step in one["schedule"]] == [False, False, True]
    assert sum(own is not None for own in trees) >= 10  # a start's first candidate is alone and has none
    for name, workers, runtime in (("three", 3, local), ("ray", 2, ray_runtime)):
        assert run_cluster(run, config(workers, **many), runtime, name=name) == one
        assert outputs(run.path / "cluster" / name) == outputs(run.path / "cluster/one")


class Stop(BaseException):
    pass


def test_stopped_at_every_iteration(run, monkeypatch):
    runtime = make_runtime("local")
    expected = run_cluster(run, config(1), runtime, name="whole")
    save, passes = lloyd.LloydState.save, []
    monkeypatch.setattr(lloyd.LloydState, "save", lambda state, path: (save(state, path), passes.append(state.passes)))
    run_cluster(run, config(1), runtime, name="counted")
    for stop in range(len(passes)):
        saved = []

        def save_and_stop(state, path, saved=saved, stop=stop):
            save(state, path)
            saved.append(state.passes)
            if len(saved) == stop + 1:
                raise Stop

        monkeypatch.setattr(lloyd.LloydState, "save", save_and_stop)
        with pytest.raises(Stop):
            run_cluster(run, config(1), runtime, name=f"stopped-{stop}")
        monkeypatch.setattr(lloyd.LloydState, "save", save)
        assert run_cluster(run, config(1), runtime, name=f"stopped-{stop}") == expected
        assert outputs(run.path / f"cluster/stopped-{stop}") == outputs(run.path / "cluster/whole")


def test_sums_by_ranges_are_of_this_pass_where_workers_share_only_a_store(run, s3, tmp_path, monkeypatch):
    """One machine sorts the rows, another adds them up, twice: the second pass is not read as the first was."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    features = open_features(run, ["train"])
    workers = []
    for machine in ("a", "b"):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / machine))
        workers.append(KMeansWorker(features.paths, "l2", str(storage.local_path(f"{s3}/run/cluster/main"))))
    sorts, adds = workers
    for turn in range(2):
        centroids = features.take(features.row_ids(np.arange(CLUSTERS) + turn))[None].astype(np.float32)
        for part in range(PARTS):
            sorts.sort((part, 0), (Pass.of(centroids, np.ones(1)), str(turn)))
        for wanted in ranges.ranges(centroids):
            found, expected = (worker.add_range(wanted, str(turn)) for worker in (adds, sorts))
            np.testing.assert_array_equal(found.counts, expected.counts)
            np.testing.assert_array_equal(found.sums, expected.sums)
    local = adds.output / "ranges"
    assert [folder.name for folder in local.iterdir()] == ["1"], "what is no longer needed is not kept"


def test_a_clustering_goes_on_on_the_device_that_it_was_begun_on(run, monkeypatch):
    runtime = make_runtime("local")
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(PoolRows, "totals", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        run_cluster(run, config(1), runtime)
    (run.path / "cluster/main/device.json").write_text('{"device": "cuda"}')
    with pytest.raises(UserError, match="begun on another device"):
        run_cluster(run, config(1), runtime)
    assert run_cluster(run, config(1), runtime, overwrite=True)["num_clusters"] == CLUSTERS
