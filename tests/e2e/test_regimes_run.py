"""Joint training and self-supervision as the objective, through the whole line: what the objective says of a sample
reaches features, clusters, anomaly scores and the report; and planted degenerate data end in words.
"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from tars import encode_png, write_tar

SETTINGS = [
    "runtime.name=local",
    "runtime.workers=1",
    "pretrain.num_workers=1",
    "pretrain.epochs=null",
    "pretrain.steps=12",
    "pretrain.global_batch=32",
    "pretrain.num_streams=2",
    "pretrain.zero_stage=0",
    "pretrain.evaluate_every=0",
    "pretrain.evaluate_samples=64",
    "pretrain.log_every=1",
    "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_type: deep, stem_width: 4}",
    "cluster.num_init=1",
    "cluster.num_clusters=4",
    "index=null",
    "baselines=[]",
    "pack=null",
]
JOINT = (
    "pretrain.objective={name: joint, terms: [{objective: {name: scan, num_clusters: 4, num_heads: 2, "
    "num_neighbours: 4}}, {objective: {name: deep_svdd}}, {objective: {name: simsiam, output_dim: 32}}]}"
)


def arguments(folder, data, *more):
    config = ROOT / "configs" / "quickstart.yaml"
    return ["run", "-c", config, "--run", folder, f"datasets.train={data}", *SETTINGS, *more]


def test_what_the_objective_says_of_a_sample_reaches_every_stage(cli, packed_digits, tmp_path):
    data, run = packed_digits(200), tmp_path / "run"
    methods = ["cluster.method=objective", "anomaly.method=objective", "anomaly.normal_labels=[0,1,2,3,4]"]
    methods += ["baselines=[pixels]", "embed.part_rows=120", "pretrain.held_out=train"]
    done = cli(*arguments(run, data, JOINT, *methods), "--json")
    assert done.code == 0, done.err
    measures = done.result["pretrain"]["measures"]
    assert {"held_out_loss", "clusters_used", "largest_cluster", "agreement"} <= measures.keys()
    tables = [pq.read_table(path) for path in sorted((run / "embed" / "train").glob("part-*.parquet"))]
    probs = np.array([row for table in tables for row in table.column("cluster_probs").to_pylist()])
    scores = np.concatenate([table.column("score").to_numpy() for table in tables])
    assert probs.shape == (200, 4) and np.allclose(probs.sum(axis=1), 1, atol=1e-5)
    for kind, name, expected in (("cluster", "assignments", probs.argmax(axis=1)), ("anomaly", "scores", scores)):
        parts = sorted((run / kind / "main" / name / "train").glob("*.npy"))
        np.testing.assert_array_equal(np.concatenate([np.load(part) for part in parts]), expected)
    result = done.result["cluster"]
    assert result["num_clusters"] == 4 and sum(result["sizes"]) == 200 and result["measures"]["nmi"] is not None
    assert 0 <= done.result["anomaly"]["measures"]["auroc"] <= 1
    assert done.result["baselines"]["pixels"]["num_clusters"] == 4
    page = (run / "report" / "index.html").read_text()
    assert "scored by the training objective" in page and "Agreement of starts" in page
    again = cli(*arguments(run, data, JOINT, *methods))
    assert again.code == 0 and "200 samples in 4 clusters" in again.out
    refused = cli("cluster", "--run", run / "baselines" / "pixels", "-c", run / "config.yaml", "--name", "other")
    assert refused.code == 2 and "gives no cluster_probs" in refused.err


@pytest.fixture
def planted(tmp_path):
    """`planted(pixels)`: shards of these images, uint8 (N, 8, 8)."""

    def write(pixels):
        members = [(f"{i:04d}.png", encode_png(image)) for i, image in enumerate(pixels)]
        write_tar(tmp_path / "planted" / "train-0.tar", members)
        return tmp_path / "planted"

    return write


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or np.isfinite(value)


OBJECTIVES = {
    "scan": "{name: scan, num_clusters: 4, num_heads: 2, num_neighbours: 4}",
    "temi": "{name: temi, num_clusters: 4, num_heads: 2, num_neighbours: 4}",
    "iic": "{name: iic, num_clusters: 4, num_heads: 2}",
    "sela": "{name: sela, num_clusters: 4, num_heads: 2}",
    "idec": "{name: idec, num_clusters: 4, latent_dim: 4, decoder_width: 8}",
    "experts": "{name: experts, num_clusters: 4, num_heads: 2, target_dim: 4, tasks: 1}",
}


@pytest.mark.parametrize("kind", ["identical", "one class of 99%"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_degenerate_data_end_in_a_warning_and_finite_numbers(cli, planted, tmp_path, name, kind):
    pixels = np.full((100, 8, 8), 90, np.uint8)
    if kind != "identical":
        pixels = pixels + np.random.default_rng(0).integers(0, 3, pixels.shape, dtype=np.uint8)
        pixels[99, :4] = 255
    still = "pretrain.views={size: 8, crop_scale: [1, 1], flip: 0}" if kind == "identical" else "pretrain.views.size=8"
    more = ["pretrain.steps=6", "cluster.method=objective", "anomaly=null", "report=null"]
    objective = f"pretrain.objective={OBJECTIVES[name]}"
    done = cli(*arguments(tmp_path / "run", planted(pixels), still, objective, *more), "--json")
    assert done.code == 0, done.err
    assert finite(done.result)
    if kind == "identical":
        assert any("collapsed" in warning for warning in done.result["pretrain"]["warnings"])
        assert any("of 4 clusters are empty" in warning for warning in done.result["cluster"]["warnings"])
        lines = (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
        assert all(finite(json.loads(line)) for line in lines)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{name: iic, num_clusters: 1}", "num_clusters"),
        ("{name: iic, num_clusters: 101}", "more clusters than samples"),
        ("{name: sela, num_clusters: 101}", "more clusters than samples"),
    ],
)
def test_impossible_numbers_of_clusters_are_refused(cli, planted, tmp_path, objective, message):
    pixels = np.random.default_rng(0).integers(0, 255, (100, 8, 8), dtype=np.uint8)
    done = cli(
        *arguments(tmp_path / "run", planted(pixels), f"pretrain.objective={objective}", "pretrain.views.size=8")
    )
    assert done.code == 2 and message in done.err
