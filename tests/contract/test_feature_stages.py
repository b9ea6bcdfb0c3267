"""Index, cluster and anomaly over a feature store: plain outputs, the same after any kill and with any workers."""

import contextlib
import json
import weakref

import faiss
import numpy as np
import pytest

from sslscale.anomaly.stage import run_anomaly
from sslscale.cluster.stage import run_cluster
from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, FeatureStore, open_features
from sslscale.features.files import open_npy
from sslscale.index import Index
from sslscale.index.build import run_index
from sslscale.index.query import run_search
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

SIZES = {"train": (120, 0, 90), "test": (60,)}
DIM, CLASSES = 8, 4
STAGES = {"index": run_index, "cluster": run_cluster, "anomaly": run_anomaly}


class Killed(BaseException):
    pass


class DyingRuntime:
    """Runs everything in this process, and dies before it would yield the result of the given number."""

    name = "local"
    device = staticmethod(lambda name: "cpu")

    def __init__(self, dies_at=None):
        self.dies_at, self.yielded = dies_at, 0

    @contextlib.contextmanager
    def pool(self, worker, setup, workers, resources=None):
        self.worker = worker(**setup)
        yield self

    def map(self, method, items, broadcast=None, *, ordered=False):
        for index, item in enumerate(items):
            if self.yielded == self.dies_at:
                raise Killed
            self.yielded += 1
            yield index, getattr(self.worker, method)(item, broadcast)


def write_features(path, name, labels=True, backbone="b0"):
    generator = np.random.default_rng(len(name))
    centres = 4 * np.eye(CLASSES, DIM)
    store = FeatureStore.create(path / "embed" / name, dim=DIM, dtype="fp16", normalized=False, backbone=backbone)
    records = []
    for part, size in enumerate(SIZES[name]):
        truth = generator.integers(0, CLASSES, size)
        truth[:3] = truth[3:4]
        rows = centres[truth] + generator.normal(scale=0.5, size=(size, DIM))
        if size > 60:
            rows[:3] = rows[3]  # duplicates
        keys = [f"{name}-{part}-{row}" for row in range(size)]
        records.append(store.write_part(part, rows, keys, ["s"] * size, range(size), truth if labels else None))
    store.commit(records)


@pytest.fixture
def run(tmp_path):
    for name in SIZES:
        write_features(tmp_path / "run", name)
    return RunDir(tmp_path / "run")


def config(**stages):
    defaults = {
        "cluster": {"num_clusters": CLASSES, "num_init": 2},
        "anomaly": {"k": 5, "normal_labels": [0, 1, 2]},
        "runtime": {"name": "local", "workers": 1},
    }
    return RunConfig.model_validate({**defaults, **stages})


def outputs(path):
    """Every array below a stage's folder, as bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.npy"))}


def test_outputs_open_with_plain_tools(run):
    results = {kind: stage(run, config(), DyingRuntime()) for kind, stage in STAGES.items()}
    features = open_features(run)
    assert list(features.stores) == ["test", "train"] and features.num_rows == 270

    index = faiss.read_index(str(run.path / "index/main/index.faiss"))
    assert index.ntotal == results["index"]["num_vectors"] == 270
    assert results["index"]["factory"] == "Flat" and results["index"]["recall_at_10"] > 0.98
    assert results["index"]["bytes"] == (run.path / "index/main/index.faiss").stat().st_size

    centroids = np.load(run.path / "cluster/main/centroids.npy")
    assert centroids.shape == (CLASSES, DIM) and centroids.dtype == np.float32
    objective = 0.0
    for part in features.parts:
        rows = features.block(part.number).astype(np.float64)
        assignments = np.load(run.path / "cluster/main/assignments" / part.file)
        distances = np.load(run.path / "cluster/main/distances" / part.file)
        scores = np.load(run.path / "anomaly/main/scores" / part.file)
        neighbours = np.load(run.path / "anomaly/main/neighbours" / part.file)
        assert assignments.dtype == np.int32 and distances.dtype == scores.dtype == np.float32
        assert neighbours.dtype == np.int64 and neighbours.shape == (part.rows, 5)
        assert len(assignments) == len(distances) == len(scores) == part.rows
        np.testing.assert_allclose(distances, np.linalg.norm(rows - centroids[assignments], axis=1), rtol=1e-6)
        objective += (distances.astype(np.float64) ** 2).sum()
        assert not (neighbours == (part.number << 32 | np.arange(part.rows))[:, None]).any()
        assert len(features.keys_of(neighbours.ravel())) == 5 * part.rows

    cluster = results["cluster"]
    assert cluster["objective"] == pytest.approx(objective, rel=1e-5)
    assert cluster["num_samples"] == sum(cluster["sizes"]) == 270 and cluster["num_clusters"] == CLASSES
    assert cluster["measures"]["acc"] == 1 and cluster["measures"]["silhouette"] > 0.5
    assert cluster["datasets"]["test"]["num_samples"] == 60
    assert results["anomaly"]["num_samples"] == 270 and 0 <= results["anomaly"]["measures"]["auroc"] <= 1
    for kind, result in results.items():
        assert json.loads((run.path / kind / "main/result.json").read_text()) == result


def test_a_finished_stage_does_no_work_again(run):
    for stage in STAGES.values():
        first = stage(run, config(), DyingRuntime())
        assert stage(run, config(), DyingRuntime(dies_at=0)) == first


@pytest.mark.parametrize("kind", ["cluster", "anomaly"])
def test_killed_anywhere_the_same_command_goes_on_to_the_same_bytes(run, tmp_path, kind):
    settings = config(cluster={"num_clusters": 12, "num_init": 2, "init": "random", "max_iterations": 6})
    stage, path = STAGES[kind], run.path / kind
    counting = DyingRuntime()
    expected_result = stage(run, settings, counting, name="whole")
    expected = outputs(path / "whole")
    assert len(expected) == (9 if kind == "cluster" else 8)
    for dies_at in range(counting.yielded):
        with pytest.raises(Killed):
            stage(run, settings, DyingRuntime(dies_at), name=f"killed-{dies_at}")
        assert not (path / f"killed-{dies_at}" / "result.json").exists()
        resumed = DyingRuntime()
        assert stage(run, settings, resumed, name=f"killed-{dies_at}") == expected_result
        assert outputs(path / f"killed-{dies_at}") == expected
        assert resumed.yielded <= counting.yielded - dies_at + len(open_features(run).parts)  # at most one pass again


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_workers_do_not_change_a_byte(run, metric):
    settings = {"cluster": {"num_clusters": 12, "metric": metric, "num_init": 2}, "anomaly": {"k": 5, "metric": metric}}
    inline = config(**settings)
    spawned = config(**settings, runtime={"name": "local", "workers": 2})
    runtime = make_runtime("local")
    for kind in ("cluster", "anomaly"):
        STAGES[kind](run, inline, DyingRuntime(), name="inline")
        STAGES[kind](run, inline, runtime, name="one")
        STAGES[kind](run, spawned, runtime, name="two")
        expected = outputs(run.path / kind / "inline")
        assert expected and outputs(run.path / kind / "one") == expected == outputs(run.path / kind / "two")
    runtime.close()


def test_a_sweep_keeps_the_best_number_and_goes_on_after_a_kill(run):
    settings = config(cluster={"num_clusters": [9, 2, CLASSES], "num_init": 2, "silhouette_samples": 200})
    counting = DyingRuntime()
    result = run_cluster(run, settings, counting, name="whole")
    assert [line["num_clusters"] for line in result["sweep"]] == [2, CLASSES, 9]
    assert result["num_clusters"] == len(result["sizes"]) == CLASSES
    assert result["objective"] == pytest.approx(result["sweep"][1]["objective"], rel=1e-5)
    assert (run.path / "cluster/whole/metrics.jsonl").read_text()
    for dies_at in range(0, counting.yielded, 7):
        with pytest.raises(Killed):
            run_cluster(run, settings, DyingRuntime(dies_at), name=f"killed-{dies_at}")
        assert run_cluster(run, settings, DyingRuntime(), name=f"killed-{dies_at}") == result


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("method", ["hdbscan", "gmm", "spectral", "ward"])
def test_other_clusterers_write_what_kmeans_writes(run, method, metric):
    settings = {"num_clusters": CLASSES, "method": method, "metric": metric}
    result = run_cluster(run, config(cluster=settings), DyingRuntime())
    assert set(outputs(run.path / "cluster/main")) == {
        "centroids.npy", *(f"{kind}/{part.file}" for kind in ("assignments", "distances")
                           for part in open_features(run).parts)
    }  # fmt: skip
    assert sum(result["sizes"]) == 270 and result["num_clusters"] == CLASSES and result["measures"]["acc"] > 0.95
    assert result["noise"] == 0 or method == "hdbscan"
    check_distances(run, result, metric)


def check_distances(run, result, metric):
    """The distances are those between rows and centroids as the metric defines them, and add up to the objective."""
    centroids, objective = np.load(run.path / "cluster/main/centroids.npy").astype(np.float64), 0.0
    for part in open_features(run).parts:
        rows = open_features(run).block(part.number).astype(np.float64)
        assignments = np.load(run.path / "cluster/main/assignments" / part.file)
        distances = np.load(run.path / "cluster/main/distances" / part.file)
        own = centroids[assignments]
        cosine = (rows * own).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(own, axis=1)
        expected = np.linalg.norm(rows - own, axis=1) if metric == "l2" else 1 - cosine
        np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-6)
        objective += (expected**2 if metric == "l2" else expected).sum()
    assert result["objective"] == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_objectives_clusters_are_measured_as_the_others_are(tmp_path, metric):
    generator = np.random.default_rng(0)
    given = generator.integers(0, 3, 130)
    rows = (9 * np.eye(3, DIM)[given] + generator.normal(size=(130, DIM))) * generator.uniform(1, 5, (130, 1))
    parts = [rows[:80], rows[:0], rows[80:]]
    run = write_parts(tmp_path, parts, cluster_probs=lambda own: np.eye(3, dtype=np.float32)[own[:, :3].argmax(axis=1)])
    result = run_cluster(run, config(cluster={"method": "objective", "metric": metric}), DyingRuntime())
    assert result["num_clusters"] == 3 and sum(result["sizes"]) == 130
    check_distances(run, result, metric)


def test_sums_of_the_objectives_clusters_are_added_up_as_they_come(tmp_path):
    """They are of every cluster: the driver never has those of more than two parts."""

    class Counting(DyingRuntime):
        def map(self, method, items, broadcast=None, *, ordered=False):
            given = []
            for index, found in super().map(method, items, broadcast, ordered=ordered):
                if method == "given":
                    assert ordered and sum(sums() is not None for sums in given) < 3
                    given.append(weakref.ref(found[0]))
                yield index, found
                del found

    parts = np.random.default_rng(0).normal(size=(9, 20, DIM))
    run = write_parts(tmp_path, parts, cluster_probs=lambda own: own[:, :3].astype(np.float32))
    assert run_cluster(run, config(cluster={"method": "objective"}), Counting())["num_clusters"] == 3


def test_measures_that_need_labels_are_null_without_them(tmp_path):
    write_features(tmp_path, "train", labels=False)
    run = RunDir(tmp_path)
    measures = run_cluster(run, config(), DyingRuntime())["measures"]
    assert [measures[name] for name in ("acc", "nmi", "ari", "purity")] == [None] * 4
    assert measures["silhouette"] > 0.5 and measures["davies_bouldin"] > 0 and measures["imbalance"] >= 1
    assert set(run_anomaly(run, config(), DyingRuntime())["measures"].values()) == {None}


def write_parts(folder, parts, **columns):
    """A store of parts of rows (n, DIM), with columns given by functions of the rows; labels are 0 and 1 by turns."""
    store = FeatureStore.create(folder / "embed/train", dim=DIM, dtype="fp16", normalized=False, backbone="b0")
    records = []
    for part, rows in enumerate(parts):
        keys = [f"{part}-{row}" for row in range(len(rows))]
        labels = np.arange(len(rows)) % 2 if len(rows) else None
        own = {name: column(rows) for name, column in columns.items()} if len(rows) else None
        records.append(store.write_part(part, rows, keys, ["s"] * len(rows), range(len(rows)), labels, own))
    store.commit(records)
    return RunDir(folder)


def test_a_part_without_rows_takes_no_measure_from_the_others(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, DIM))
    run = write_parts(tmp_path, [rows, rows[:0]])
    assert run_cluster(run, config(), DyingRuntime())["measures"]["acc"] > 0.2
    assert run_anomaly(run, config(anomaly={"normal_labels": [0]}), DyingRuntime())["measures"]["auroc"] is not None


@pytest.fixture
def few_open_files(monkeypatch):
    """The driver never has more than 8 of a stage's files open: a process may have about a thousand."""
    opened = []

    def open_counted(path):
        assert sum(array() is not None for array in opened) < 8
        array = open_npy(path)
        opened.append(weakref.ref(array))
        return array

    for module in ("anomaly", "cluster"):
        monkeypatch.setattr(f"sslscale.{module}.stage.open_npy", open_counted)


def test_the_scores_of_many_parts_are_not_open_at_a_time(tmp_path, few_open_files):
    parts = np.random.default_rng(0).normal(size=(20, 4, DIM))
    run = write_parts(tmp_path, parts, score=lambda rows: np.arange(len(rows), dtype=np.float32))
    result = run_anomaly(run, config(anomaly={"method": "objective", "normal_labels": [0]}), DyingRuntime())
    assert result["mean_score"] == 1.5 and result["measures"]["auroc"] == 0.75


def test_the_children_of_many_parents_are_not_open_at_a_time(tmp_path, few_open_files):
    run = write_parts(tmp_path, [np.random.default_rng(0).normal(size=(400, DIM))])
    settings = {"num_clusters": 300, "method": "hierarchical", "num_init": 1, "max_iterations": 2}
    result = run_cluster(run, config(cluster=settings), DyingRuntime())
    assert result["num_parents"] == 17 and result["num_clusters"] == 300


def test_anomalies_against_a_reference(run):
    settings = config(anomaly={"datasets": ["test"], "reference": ["train"], "k": 3})
    result = run_anomaly(run, settings, DyingRuntime())
    assert result["num_samples"] == 60 and result["num_reference"] == 210 and result["reference"] == ["train"]
    neighbours = np.load(run.path / "anomaly/main/neighbours/test/part-00000.npy")
    keys = open_features(run, ["train"]).keys_of(neighbours.ravel())
    assert all(key.startswith("train-") for key in keys)


@pytest.mark.parametrize(
    ("metric", "factory"), [("l2", "Flat"), ("cosine", "IVF8,Flat"), ("cosine", "IVF8,PQ4x4,Refine(SQfp16)")]
)
def test_search(run, metric, factory):
    result = run_index(run, config(index={"metric": metric, "factory": factory}), DyingRuntime())
    assert result["recall_at_10"] > 0.5 and (result["nprobe"] is None) == (factory == "Flat")
    index = Index.open(run)
    query = index.features.lookup("train-2-7")
    distances, ids = index.search(index.features.take(np.array([query])), 4)
    assert ids[0, 0] == query and index.keys(ids[0, :1]) == ["train-2-7"]
    x, near = (index.features.take(rows).astype(np.float64) for rows in (np.array([query]), ids[0]))
    cosine = 1 - near @ x[0] / np.linalg.norm(near, axis=1) / np.linalg.norm(x)
    expected = np.linalg.norm(near - x, axis=1) if metric == "l2" else cosine
    np.testing.assert_allclose(distances[0], expected, atol=2e-3)
    found = run_search(run, key="train-2-7", k=3)
    assert [row["key"] for row in found] == index.keys(ids[0, 1:]) and found[0]["dataset"] in SIZES


def test_search_leaves_out_the_key_itself_but_not_its_duplicates(run):
    run_index(run, config(), DyingRuntime())
    found = run_search(run, key="train-0-1", k=3)
    assert {row["key"] for row in found} == {"train-0-0", "train-0-2", "train-0-3"}
    assert all(row["distance"] == pytest.approx(0, abs=1e-6) for row in found)


def test_wrong_searches(run):
    with pytest.raises(UserError, match="sslscale index"):
        run_search(run, key="train-0-0")
    run_index(run, config(), DyingRuntime())
    index = Index.open(run)
    for arguments, message in [
        ((np.ones((1, DIM + 1)), 1), "dimension"),
        ((np.ones((1, DIM)), 271), "1 to 270"),
        ((np.full((1, DIM), np.nan), 1), "finite"),
    ]:
        with pytest.raises(UserError, match=message):
            index.search(*arguments)
    with pytest.raises(UserError, match="another backbone"):
        index.search(np.ones((1, DIM)), 1, backbone="b1")
    with pytest.raises(UserError, match="no sample with this key"):
        run_search(run, key="nobody")
    with pytest.raises(UserError, match="1 to 269"):
        run_search(run, key="train-0-0", k=270)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("index", {"factory": "IFV16"}, "factory"),
        ("index", {"factory": "IVF512,Flat"}, "at most 270 lists"),
        ("cluster", {"num_clusters": 271}, "more clusters than samples"),
        ("cluster", {"num_clusters": [2, 271]}, "more clusters than samples"),
        ("anomaly", {"k": 270}, "1 to 269"),
        ("cluster", {"datasets": ["tset"]}, "did you mean 'test'"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(run, kind, settings, message):
    with pytest.raises(UserError, match=message):
        STAGES[kind](run, config(**{kind: settings}), DyingRuntime())
    assert not (run.path / kind).exists()


@pytest.mark.parametrize("kind", STAGES)
def test_features_of_another_backbone_are_refused(run, kind):
    STAGES[kind](run, config(), DyingRuntime())
    for name in SIZES:
        write_features(run.path, name, backbone="b1")
    with pytest.raises(UserError, match="made with other settings"):
        STAGES[kind](run, config(), DyingRuntime())
    write_features(run.path, "test", backbone="b2")
    with pytest.raises(UserError, match="backbone: test has 'b2', train has 'b1'"):
        STAGES[kind](run, config(), DyingRuntime(), overwrite=True)


def test_an_index_of_earlier_features_is_refused(run):
    run_index(run, config(index={"datasets": ["test"]}), DyingRuntime())
    write_features(run.path, "test", labels=False)
    with pytest.raises(UserError, match="other features"):
        Index.open(run)


def test_workers_open_what_the_driver_has_open(run):
    features = open_features(run, ["train", "test"])
    assert FeatureSet.open(features.paths).parts == features.parts
