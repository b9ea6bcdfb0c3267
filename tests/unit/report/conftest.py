"""A run directory with every stage in it, written by hand: two datasets, real shards and feature parts, no training."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import encode_png, write_tar

from sslscale.config import RunConfig, validate
from sslscale.features import FeatureStore, open_features
from sslscale.features.files import write_npy
from sslscale.index.record import indexed_parts, write_parts
from sslscale.rundir import RunDir, write_json

HOSTILE = "<script>alert('1')</script>"
NUM_CLUSTERS, DIM, K = 5, 4, 3
PARTS = {"train": [7, 0, 12], "test": [9]}  # rows of each part; a shard a part


@dataclass
class Made:
    """The run, and its arrays over all rows in row-id order."""

    run: RunDir
    config: RunConfig
    keys: list[str]
    labels: np.ndarray
    assignments: np.ndarray
    distances: np.ndarray
    scores: np.ndarray
    neighbours: np.ndarray
    row_ids: np.ndarray

    def results(self) -> dict[str, Any]:
        """What the pipeline would return for all stages."""

        def read(path: str) -> Any:
            return json.loads((self.run.path / path / "result.json").read_text())

        embed = {dataset: read(f"embed/{dataset}") for dataset in PARTS}
        baselines = {name: read(f"baselines/{name}/cluster/main") for name in ("hog", "pixels")}
        own = {stage: read(f"{stage}/main") for stage in ("index", "cluster", "anomaly")}
        return {"pretrain": read("pretrain"), "embed": embed, **own, "baselines": baselines}


@pytest.fixture
def make_run(tmp_path):
    """`make_run(labelled=True)` -> Made. Sample i's picture is grey i, its label i % 3; sample 0's key is hostile."""

    def make(labelled: bool = True) -> Made:
        run = RunDir(tmp_path / "run")
        total = sum(map(sum, PARTS.values()))
        keys = [HOSTILE, *(f"s{i:03d}" for i in range(1, total))]
        labels = np.arange(total) % 3
        write_features(run, tmp_path / "data", keys, labels, labelled)
        made = answers(run, keys, labels)
        config = {
            "run": str(run.path),
            "datasets": {name: str(tmp_path / "data" / name) for name in PARTS},
            "report": {"exemplars": 3, "max_clusters": 4, "anomalies": 5, "neighbours": 2, "title": "A & B"},
        }
        made.config = validate(RunConfig, config)
        write_stages(made, labelled)
        return made

    return make


def write_shard(path: Path, samples: list[tuple[str, int]]) -> None:
    members = [(f"{key}.png", encode_png(np.full((4, 4), value, np.uint8))) for key, value in samples]
    write_tar(path, members, tarfile.PAX_FORMAT)


def write_features(run: RunDir, data: Path, keys: list[str], labels: np.ndarray, labelled: bool) -> None:
    rng, first = np.random.default_rng(0), 0
    for dataset, parts in PARTS.items():
        path = run.stage_path("embed", dataset)
        store = FeatureStore.create(path, dim=DIM, dtype="fp32", normalized=False, backbone="abc")
        records = []
        for part, rows in enumerate(parts):
            here, name = slice(first, first + rows), f"{dataset}-{part}.tar"
            write_shard(data / dataset / name, [(keys[i], i) for i in range(here.start, here.stop)])
            features, own = rng.normal(size=(rows, DIM)), labels[here].tolist() if labelled else None
            records.append(store.write_part(part, features, keys[here], [name] * rows, range(rows), own))
            first += rows
        store.commit(records)
        samples = sum(parts)
        result = {"samples_in": samples + 1, "features_out": samples, "failed": 1, "dim": DIM, "dtype": "fp32"}
        result |= {"samples_per_second": 1234.5, "backbone": {"name": "hog", "location": "hog", "sha256": "abc"}}
        write_json(path / "result.json", result)
        (path / "failed").mkdir()
        failure = {"key": f"{dataset}-lost", "reason": f"the <b>png</b> ends at byte {samples}"}
        (path / "failed" / "part-00000.jsonl").write_text(json.dumps(failure) + "\n")


def answers(run: RunDir, keys: list[str], labels: np.ndarray) -> Made:
    """Random arrays with many ties; cluster 4 is the smallest, and the hostile key has the highest score."""
    rng, total = np.random.default_rng(1), len(keys)
    features = open_features(run, list(PARTS))
    row_ids = features.row_ids(np.arange(total))
    assignments = rng.permutation(np.arange(total) % (NUM_CLUSTERS - 1)).astype(np.int32)
    assignments[3] = NUM_CLUSTERS - 1
    distances = rng.integers(0, 4, total).astype(np.float32)
    scores = (rng.integers(1, 9, total) / 10).astype(np.float32)
    scores[0] = 2.5
    neighbours = rng.choice(row_ids, (total, K))
    return Made(run, RunConfig(), keys, labels, assignments, distances, scores, neighbours, row_ids)


def write_stages(made: Made, labelled: bool) -> None:
    run, features = made.run, open_features(made.run, list(PARTS))
    identity = {"features": features.identity, "reference": features.identity}
    named = {"datasets": list(PARTS)}
    cluster = run.open_stage("cluster", "main", named, identity)
    anomaly = run.open_stage("anomaly", "main", named, identity)
    arrays = [(cluster, "assignments"), (cluster, "distances"), (anomaly, "scores"), (anomaly, "neighbours")]
    first = 0
    for part in features.parts:
        for stage, name in arrays:
            write_npy(stage.path / name / part.file, getattr(made, name)[first : first + part.rows])
        first += part.rows
    cluster.finish(cluster_result(made, labelled, acc=0.9431))
    reference = {"num_reference": len(made.keys), "reference": list(PARTS), "k": K, "metric": "cosine"}
    measures = {"auroc": 0.7312 if labelled else None, "average_precision": 0.4129 if labelled else None}
    anomaly.finish({"num_samples": len(made.keys), **reference, "measures": measures})
    write_reduction(run, made, identity)
    index = {"factory": "Flat", "num_vectors": len(made.keys), "bytes": 2048, "recall_at_10": 0.9876, **named}
    stage = run.open_stage("index", "main", named, identity)
    write_parts(stage.path / "parts.json", indexed_parts(features))
    stage.finish({**index, "parts": "parts.json", "shards": []})
    for acc, name in enumerate(("pixels", "hog")):
        inner = RunDir(run.path / "baselines" / name).open_stage("cluster", "main", {}, {})
        inner.finish(cluster_result(made, labelled, acc=0.5 + acc / 10))
    write_training(run)
    hardware = {"cpu": "a cpu", "cores": 2, "memory_gb": 8.0, "gpus": ["a gpu"]}
    run.record(time="2030-01-02T03:04:05+00:00", command="run -c x.yaml", git_commit="0123abc", hardware=hardware)
    run.record(versions={"torch": "9.9"}, seeds={"run": 17})


def cluster_result(made: Made, labelled: bool, acc: float) -> dict[str, Any]:
    with_labels = {"acc": acc, "nmi": 0.9022, "ari": 0.8893, "purity": 0.9454}
    measures = with_labels if labelled else dict.fromkeys(with_labels)
    measures = {**measures, "silhouette": 0.3141, "davies_bouldin": 1.2345, "imbalance": 1.0678}
    sizes = np.bincount(made.assignments, minlength=NUM_CLUSTERS).tolist()
    counts = {"num_clusters": NUM_CLUSTERS, "num_samples": len(made.keys), "objective": 1.0, "iterations": 7}
    of_test = {"num_samples": 9, "measures": {name: value and value / 2 for name, value in measures.items()}}
    sweep = [
        {"num_clusters": k, "objective": 9.0 / k, "silhouette": 0.1 * k, "davies_bouldin": None}
        | {"stability_seeds": None, "stability_halves": 0.7531}
        for k in (2, NUM_CLUSTERS)
    ]
    return {**counts, "measures": measures, "sizes": sizes, "datasets": {"test": of_test}, "sweep": sweep}


def write_reduction(run: RunDir, made: Made, identity: dict[str, str]) -> None:
    """A map of every third row, and a table of two codes."""
    stage = run.open_stage("reduce", "main", {"datasets": list(PARTS)}, {"features": identity["features"]})
    write_npy(stage.path / "map_rows.npy", made.row_ids[::3])
    write_npy(stage.path / "map.npy", np.random.default_rng(2).normal(size=(len(made.row_ids[::3]), 2)))
    kept = {"reconstruction_error": 0.0, "recall_at_10": 1.0, "recall_at_10_reranked": 1.0}
    lost = {"reconstruction_error": 0.2468, "recall_at_10": 0.8642, "recall_at_10_reranked": 0.9753}
    table = [{"method": "fp32", "bytes_per_vector": 16, **kept}, {"method": "SQ8", "bytes_per_vector": 4, **lost}]
    counts = {"num_vectors": len(made.keys), "dim": DIM}
    stage.finish({**counts, "table": table, "map": {"method": "pca", "num_points": len(made.row_ids[::3])}})


def write_training(run: RunDir) -> None:
    path = run.stage_path("pretrain")
    path.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 5.0 / step, "lr": 1e-3, "custom": step, "total_steps": 500} for step in range(1, 501)
    ]
    lines[9]["loss"] = None  # not finite
    lines += [{"step": 500, "eval_rankme": 41.52, "eval_feature_std": 0.0493, "total_steps": 500}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"world_size": 2, "zero_stage": 1, "backend": "gloo", "device": "cpu", "versions": {"ray": "2.99"}}
    result |= {"precision": "bf16"}
    result |= {"objective": {"name": "simclr"}, "steps": 500, "samples": 8000, "epochs": 12.5, "bad_steps": 1}
    result |= {"failed": 0, "seconds": 100.0, "samples_per_second": 80.0, "data_wait_share": 0.0123}
    write_json(path / "result.json", {**result, "measures": {"rankme": 41.52, "feature_std": 0.0493}})
