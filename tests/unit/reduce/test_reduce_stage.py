import sys

import faiss
import numpy as np
import pytest

from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureStore, open_features
from sslscale.reduce.compress import codecs, empty_codec, measure, neighbours
from sslscale.reduce.stage import run_reduce
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

DIM = 16


@pytest.fixture
def run(tmp_path):
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(8, DIM))
    for name, size in {"train": 700, "test": 300}.items():
        store = FeatureStore.create(tmp_path / "embed" / name, dim=DIM, dtype="fp16", normalized=False, backbone="b")
        rows = generator.normal(size=(size, 8)) @ mixing + 0.1 * generator.normal(size=(size, DIM))
        store.commit([store.write_part(0, rows, [f"{name}{row}" for row in range(size)], ["s"] * size, range(size))])
    return RunDir(tmp_path)


def config(**settings):
    settings = {"code_bytes": [2], "pca_dims": [8], "queries": 100, "map_rows": 100, **settings}
    return RunConfig.model_validate({"reduce": settings})


def test_the_table_says_what_each_method_keeps(run):
    result = run_reduce(run, config(), make_runtime("local"))
    table = {line["method"]: line for line in result["table"]}
    assert [line["bytes_per_vector"] for line in table.values()] == [64, 32, 16, 32, 2, 10]
    assert table["fp16"]["recall_at_10"] > 0.99 and table["fp16"]["reconstruction_error"] < 1e-6
    assert 0 < table["SQ8"]["reconstruction_error"] < 1e-3
    assert table["PCA8"]["reconstruction_error"] < 0.02  # all but the noise lies in 8 dimensions
    assert 0.01 < table["OPQ+PQ2"]["reconstruction_error"] < 0.9
    for line in table.values():
        assert line["recall_at_10"] <= line["recall_at_10_reranked"] + 1e-9
    assert run_reduce(run, config(), make_runtime("local")) == result
    codec = faiss.read_index(str(run.path / "reduce/main/codecs/OPQ+PQ2.faiss"))
    assert codec.sa_encode(np.zeros((2, DIM), np.float32)).shape == (2, 2)


def test_the_result_says_what_its_table_was_measured_on(run):
    settings = {"code_bytes": [], "pca_dims": [], "rows": 300, "queries": 400, "candidates": 20, "map": None}
    result = run_reduce(run, config(**settings), make_runtime("local"))
    expected = {"num_vectors": 1000, "rows": 300, "queries": 300, "candidates": 20, "metric": "cosine"}
    assert {key: result[key] for key in expected} == expected


def test_a_config_without_the_section_has_its_defaults(run, monkeypatch):
    monkeypatch.setattr("sslscale.reduce.stage._table", lambda stage, settings, seed, features: [settings.code_bytes])
    result = run_reduce(run, RunConfig(), make_runtime("local"))
    assert (result["table"], result["map"]) == ([[16, 32]], {"method": "pca", "num_points": 1000})
    asked_for = RunConfig.model_validate({"reduce": {}})
    assert run_reduce(run, asked_for, make_runtime("local")) == result


def test_too_few_rows_to_train_on_are_refused(run):
    with pytest.raises(UserError, match=r"1000 vectors, reduce.rows=255[\s\S]*at least 256"):
        run_reduce(run, config(rows=255), make_runtime("local"))
    assert not (run.path / "reduce").exists()


def test_pca_loses_what_lies_outside_its_subspace_and_nothing_of_the_mean(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, DIM)).astype(np.float32) * np.geomspace(4, 0.1, DIM) + 7
    codec = empty_codec("PCA4,Flat", DIM)
    codec.train(x)
    faiss.write_index(codec, str(tmp_path / "codec"))
    at = np.arange(10)
    line = measure(faiss.read_index(str(tmp_path / "codec")), x, at, neighbours(x, at), 20)
    energies = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))
    assert line["reconstruction_error"] == pytest.approx(energies[:-4].sum() / energies.sum(), rel=1e-3)


def test_the_map_has_its_share_of_every_dataset(run):
    assert run_reduce(run, config(code_bytes=[], pca_dims=[]), make_runtime("local"))["map"] == {
        "method": "pca",
        "num_points": 100,
    }
    points, ids = (np.load(run.path / "reduce/main" / name) for name in ("map.npy", "map_rows.npy"))
    assert points.shape == (100, 2) and points.dtype == np.float32 and np.isfinite(points).all()
    datasets = [record["dataset"] for record in open_features(run).records(ids)]
    assert datasets.count("train") == 70 and datasets.count("test") == 30


def test_recall_leaves_the_query_out_but_not_its_duplicates():
    x = np.repeat(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32), 2, axis=0)
    at = np.arange(0, 80, 7)
    truth = neighbours(x, at)
    assert (truth[:, 0] == at ^ 1).all()
    codec = faiss.index_factory(8, "Flat")
    line = measure(codec, x, at, truth, candidates=20)
    assert line["recall_at_10_reranked"] == 1 and line["reconstruction_error"] == 0


def test_few_candidates_are_too_few_to_rank_again_and_for_nothing_else():
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    at = np.arange(0, 60, 7)
    truth = neighbours(x, at)
    lines = [measure(faiss.index_factory(8, "Flat"), x, at, truth, candidates=count) for count in (5, 20)]
    assert [line["recall_at_10"] for line in lines] == [1, 1]
    assert [line["recall_at_10_reranked"] for line in lines] == [0.5, 1]


@pytest.mark.parametrize(("dim", "size"), [(31, 16), (48, 32), (8, 16), (64, 16)])
def test_codes_keep_every_dimension(dim, size):
    factory = codecs(dim, [size], [])[f"OPQ+PQ{size}"]
    rotated = int(factory.partition("_")[2].partition(",")[0])
    assert rotated >= dim and rotated % size == 0 and rotated < dim + size
    assert faiss.index_factory(dim, factory).d == dim


def test_codecs_fit_the_dimension():
    for dim in (20, 384):
        for factory in codecs(dim, [16], [32]).values():
            assert faiss.index_factory(dim, factory).d == dim
    assert "PCA32" not in codecs(20, [16], [32])


def test_a_missing_package_is_named_before_anything_starts(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"sslscale\[maps\]"):
        run_reduce(run, config(map="umap"), make_runtime("local"))
    assert not (run.path / "reduce").exists()
