"""The quickstart is the real thing: every stage's files open with plain libraries, and the numbers agree."""

import json

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import small_run

import sslscale


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def run(trained):
    return trained / "run"


def test_the_ranks_say_what_they_ran(run):
    import deepspeed
    import ray

    result = read(run / "pretrain" / "result.json")
    assert result["world_size"] == 2 and result["zero_stage"] == 1 and result["backend"] == "gloo"
    assert result["versions"]["deepspeed"] == deepspeed.__version__
    assert result["versions"]["ray"] == ray.__version__
    assert result["steps"] == 12 and result["samples"] == 12 * 64 and result["failed"] == 0
    assert 0 <= result["data_wait_share"] < 1 and result["samples_per_second"] > 0


def test_the_curves_and_the_health_are_recorded(run):
    lines = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert {"eval_rankme", "eval_feature_std"} <= {key for line in lines for key in line}
    assert list((run / "pretrain" / "tensorboard").glob("events.*"))


def test_features_open_with_numpy_and_pyarrow_and_counts_add_up(run):
    folder = run / "embed" / "train"
    result, parts = read(folder / "result.json"), sorted(folder.glob("part-*.npy"))
    rows = [np.load(part, mmap_mode="r") for part in parts]
    tables = [pq.read_table(part.with_suffix(".parquet")) for part in parts]
    assert [len(r) for r in rows] == [len(t) for t in tables] == [500, 500, 500, 297]
    assert sum(map(len, rows)) == result["features_out"] == result["samples_in"] - result["failed"] == 1797
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    assert len(set(keys)) == 1797
    norms = np.linalg.norm(np.concatenate(rows).astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=2e-3)


def test_the_index_opens_with_faiss_and_finds_each_row_first(run):
    index = faiss.read_index(str(run / "index" / "main" / "index.faiss"))
    rows = np.load(run / "embed" / "train" / "part-00001.npy")[:20].astype(np.float32)
    _, found = index.search(rows / np.linalg.norm(rows, axis=1, keepdims=True), 1)
    row_ids = np.load(run / "index" / "main" / "rows.npy")
    assert row_ids[found[:, 0]].tolist() == [(1 << 32) | row for row in range(20)]
    result = read(run / "index" / "main" / "result.json")
    assert index.ntotal == result["num_vectors"] == 1797
    assert result["recall_at_10"] > 0.95  # by ids: rows at the same distance may count as misses


def test_assignments_are_the_nearest_centroids(run):
    folder = run / "cluster" / "main"
    centroids = np.load(folder / "centroids.npy")
    assert centroids.shape == (10, 32)
    for part in range(4):
        rows = np.load(run / "embed" / "train" / f"part-{part:05d}.npy").astype(np.float64)
        labels = np.load(folder / "assignments" / "train" / f"part-{part:05d}.npy")
        distances = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
        chosen = distances[np.arange(len(rows)), labels]
        np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-5)
    assert sum(read(folder / "result.json")["sizes"]) == 1797


def test_scores_are_mean_distances_to_the_nearest_others(run):
    folder = run / "anomaly" / "main" / "scores" / "train"
    scores = np.concatenate([np.load(part) for part in sorted(folder.glob("part-*.npy"))])
    rows = np.concatenate([np.load(part) for part in sorted((run / "embed" / "train").glob("part-*.npy"))])
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distances = 1.0 - rows @ rows.T
    np.fill_diagonal(distances, np.inf)
    expected = np.sort(distances, axis=1)[:, :10].mean(axis=1)
    np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_the_manifest_says_where_it_comes_from(run):
    manifest = read(run / "manifest.json")
    assert manifest["status"] == "done" and manifest["versions"]["sslscale"] == sslscale.__version__
    assert manifest["hardware"]["cores"] >= 1 and manifest["seeds"] == {"run": 0}
    assert manifest["counts"]["embed"]["train"]["features_out"] == 1797


def test_the_report_is_one_file_with_the_measures(run):
    page = (run / "report" / "index.html").read_text()
    acc = read(run / "cluster" / "main" / "result.json")["measures"]["acc"]
    assert f"{acc:.3f}" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_same_command_says_that_all_is_done(trained, cli):
    before = (trained / "run" / "embed" / "train" / "part-00000.npy").stat().st_mtime_ns
    outcome = cli("run", *small_run(trained), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.result["cluster"]["num_samples"] == 1797
    assert (trained / "run" / "embed" / "train" / "part-00000.npy").stat().st_mtime_ns == before


def test_search_finds_other_samples_of_the_run(trained, cli):
    outcome = cli("search", trained / "run", "--key", "train-000000", "--k", 3, "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.result
    assert len(rows) == 3 and all(row["key"] != "train-000000" for row in rows)
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
