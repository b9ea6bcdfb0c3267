"""The field's worked example, end to end, on a small fixture in CIFAR-10's own file format."""

import json
import pickle

import numpy as np
import pytest
from conftest import ROOT

ROWS = {
    "data_batch_1": 16,
    "data_batch_2": 16,
    "data_batch_3": 16,
    "data_batch_4": 16,
    "data_batch_5": 16,
    "test_batch": 40,
}


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, rows in ROWS.items():
        batch = {
            b"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8),
            b"labels": rng.integers(0, 10, rows).tolist(),
            b"filenames": [f"{name}_{i}.png".encode() for i in range(rows)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def test_the_worked_example_runs_end_to_end(cifar10, tmp_path, cli):
    run = tmp_path / "run"
    data = tmp_path / "data"
    outcome = cli(
        "run",
        *("-c", ROOT / "configs" / "cifar10_context.yaml", "--run", run, "--runtime", "local", "--json"),
        *(f"pack.path={cifar10}", f"pack.output={data}", f"datasets.train={data}/train", f"datasets.test={data}/test"),
        *("runtime.workers=1", "pretrain.num_workers=1", "pretrain.epochs=null", "pretrain.steps=2"),
        *("pretrain.global_batch=16", "pretrain.num_streams=4", "embed.batch_size=16"),
    )
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert result["pack"]["splits"]["train"]["samples"] == 80 and result["pack"]["splits"]["test"]["samples"] == 40
    assert result["pretrain"]["objective"]["name"] == "context_prediction" and result["pretrain"]["steps"] == 2
    assert result["pretrain"]["num_parameters"] > 11_000_000  # a whole ResNet-18
    assert result["cluster"]["num_clusters"] == 10 and result["cluster"]["num_samples"] == 40
    assert sum(result["cluster"]["sizes"]) == 40
    assert set(result["baselines"]) == {"pixels", "hog"}
    meta = json.loads((run / "pretrain" / "backbone" / "backbone.json").read_text())
    assert meta["architecture"] == "resnet18" and meta["feature_dim"] == 512
    assert (run / "report" / "index.html").is_file()
