"""What a user can do wrong: a clear error, the right exit code, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, small_run
from tars import encode_png, write_tar

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def refused(outcome, code, *texts):
    """An error as every verb gives it: at most a few lines, no traceback, everything on stderr."""
    assert outcome.code == code, (outcome.code, outcome.err)
    message = outcome.err[outcome.err.index("error:") :]
    assert "Traceback" not in message and len(message.splitlines()) <= 6, message
    for text in texts:
        assert text in message, message


def png(value=128, size=8):
    return encode_png(np.full((size, size), value, np.uint8))


@pytest.fixture
def own_backbone(trained, tmp_path):
    """A run that has the shared run's backbone and nothing else."""
    run = tmp_path / "run"
    source = trained / "run" / "pretrain"
    shutil.copytree(source, run / "pretrain", ignore=shutil.ignore_patterns("checkpoints", "ray", "tensorboard"))
    return run


def embed(cli, run, shards, *more):
    return cli(
        *("embed", "-c", QUICKSTART, "--run", run, "--runtime", "local", "runtime.workers=1", "--json"),
        *(f"datasets.train={shards}", "embed.max_failed_share=1.0", *more),
    )


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["pretrain.epocs=3"], ["unknown setting 'pretrain.epocs'", "did you mean 'epochs'", "allowed:"]),
        (["pretrain.epochs=many"], ["pretrain.epochs", "got:", "'many'"]),
        (["pretrain.objective.temprature=0.1"], ["temprature", "did you mean 'temperature'"]),
        (["pretrain.objective.name=simcrl"], ["did you mean 'simclr'"]),
        (["pretrain.num_workers=3"], ["num_workers (3) must divide num_streams (4)"]),
        (["pretrain.global_batch=30"], ["num_streams (4) must divide global_batch (30)"]),
        (["pretrain.dataset=trian"], ["no dataset 'trian'", "did you mean 'train'"]),
        (["pretrain.micro_batch=16"], ["cannot accumulate"]),
        (["not an override"], ["section.key=value"]),
    ],
)
def test_wrong_settings_start_nothing(overrides, texts, trained, tmp_path, cli):
    outcome = cli("pretrain", *small_run(trained), "--run", tmp_path / "new", *overrides)
    refused(outcome, 2, *texts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("location", "texts"),
    [
        ("{tmp}/nothing", ["does not exist"]),
        ("{tmp}/empty", ["no shards"]),
        ("pipe:cat {tmp}/x.tar", ["pipe:"]),
        ("{tmp}/missing-{{000..002}}.tar", ["missing-000.tar"]),
    ],
)
def test_wrong_locations_start_nothing(location, texts, tmp_path, cli):
    (tmp_path / "empty").mkdir()
    shards = location.format(tmp=tmp_path)
    outcome = cli(
        "pretrain", "-c", QUICKSTART, "--run", tmp_path / "new", "--runtime", "local", f"datasets.train={shards}"
    )
    refused(outcome, 2, *texts)
    assert not (tmp_path / "new").exists()


def test_a_config_file_that_is_not_there(tmp_path, cli):
    refused(cli("run", "-c", tmp_path / "no.yaml"), 2, "no such config file")


def test_a_source_that_is_not_there(tmp_path, cli):
    outcome = cli("pack", f"pack.output={tmp_path / 'out'}", "pack.source=digit", "--run", tmp_path / "run")
    refused(outcome, 2, "did you mean 'digits'")


def test_a_run_directory_that_cannot_be_written(trained, tmp_path, cli):
    (tmp_path / "file").write_text("")
    outcome = cli("index", *small_run(trained), "--run", tmp_path / "file" / "run")
    refused(outcome, 2, "cannot be written", "--run")


def test_a_run_directory_in_use_by_another_process(trained, tmp_path, cli):
    run = tmp_path / "held"
    code = (
        "import time; from sslscale.rundir import RunDir\n"
        f"with RunDir({str(run)!r}): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        refused(cli("index", *small_run(trained), "--run", run), 2, "in use by another process", str(holder.pid))
        holder.kill()


def test_a_second_run_with_other_settings_names_what_differs(trained, cli):
    before = {path: path.read_bytes() for path in (trained / "run").glob("*.*")}
    outcome = cli("cluster", *small_run(trained), "cluster.num_clusters=7", "--runtime", "local")
    refused(outcome, 2, "num_clusters: 10 -> 7", "--overwrite", "--name")
    assert before == {path: path.read_bytes() for path in (trained / "run").glob("*.*")}


def test_more_clusters_than_samples(trained, cli):
    arguments = [*small_run(trained), "--runtime", "local", "--name", "many", "cluster.num_clusters=2000"]
    refused(cli("cluster", *arguments), 2, "2000", "1797")
    assert not (trained / "run" / "cluster" / "many").exists()


def test_features_of_another_backbone_are_refused(trained, tmp_path, cli):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, ignore=shutil.ignore_patterns("checkpoints", "ray", "index"))
    store = run / "embed" / "train" / "features.json"
    features = json.loads(store.read_text())
    store.write_text(json.dumps({**features, "backbone": "another"}))
    refused(cli("index", *small_run(trained), "--run", run, "--runtime", "local"), 2, "another")
    assert not (run / "index").exists()


def test_damaged_samples_are_counted_with_key_and_reason(own_backbone, tmp_path, cli):
    shards = tmp_path / "shards"
    good = [(f"good-{i}.png", png(i)) for i in range(20)]
    write_tar(shards / "a.tar", [*good, ("text.png", b"this is not an image"), ("alone.cls", b"3")])
    write_tar(shards / "b.tar", [("pickled.pkl", b"cos\nsystem\n(S'false'\ntR."), ("fine.png", png())])
    write_tar(shards / "c.tar", [(f"cut-{i}.png", png(i)) for i in range(10)])
    data = (shards / "c.tar").read_bytes()
    (shards / "c.tar").write_bytes(data[: 9 * 1024 + 100])  # a record is a header and one block: the tenth is cut
    (shards / "d.tar").write_bytes(b"")
    outcome = embed(cli, own_backbone, shards)
    assert outcome.code == 0, outcome.err
    result = outcome.result["train"]
    assert result["samples_in"] == result["features_out"] + result["failed"]
    assert result["features_out"] == 20 + 1 + 9
    lines = [json.loads(line) for file in (own_backbone / "embed/train/failed").iterdir() for line in file.open()]
    assert len(lines) == result["failed"]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert "cannot be decoded" in reasons["text"] and "unpickled" in reasons["pickled"] and "image" in reasons["alone"]
    assert any("c.tar" in key for key in reasons)


def test_more_failures_than_allowed_end_with_1(own_backbone, tmp_path, cli):
    write_tar(tmp_path / "shards" / "a.tar", [("good.png", png()), ("bad.png", b"no")])
    outcome = embed(cli, own_backbone, tmp_path / "shards", "embed.max_failed_share=0.25")
    refused(outcome, 1, "1 of 2", "max_failed_share")
    assert not (own_backbone / "embed" / "train" / "features.json").exists()
    assert embed(cli, own_backbone, tmp_path / "shards", "embed.max_failed_share=0.5").code == 0, "as it advises"


def test_a_run_whose_later_stage_is_refused_has_failed(own_backbone, tmp_path, cli):
    write_tar(tmp_path / "shards" / "a.tar", [("a.png", png(1)), ("b.png", png(2))])
    without = [f"{stage}=null" for stage in ("pack", "pretrain", "index", "anomaly", "report")]
    outcome = cli(
        *(
            "run",
            "-c",
            QUICKSTART,
            "--run",
            own_backbone,
            "--runtime",
            "local",
            f"datasets.train={tmp_path / 'shards'}",
        ),
        *("cluster.num_clusters=99", "baselines=[]", *without),
    )
    refused(outcome, 2, "more clusters than samples")
    assert json.loads((own_backbone / "manifest.json").read_text())["status"] == "failed"


def test_features_that_are_not_finite_never_enter_the_store(tmp_path, cli, monkeypatch):
    module = tmp_path / "modules" / "planted_backbone.py"
    module.parent.mkdir()
    module.write_text(
        "import torch\n"
        "from sslscale.models.base import Embedder\n\n\n"
        "class Planted(Embedder):\n"
        "    def __init__(self, channels, size):\n"
        "        super().__init__()\n"
        "        self.feature_dim = 2\n\n"
        "    def forward(self, images):\n"
        "        mean = images.mean(dim=(1, 2, 3))\n"
        "        return torch.stack([mean, torch.where(mean > 0.5, torch.nan, 1.0)], dim=1)\n"
    )
    monkeypatch.syspath_prepend(str(module.parent))
    write_tar(tmp_path / "shards" / "a.tar", [("dark.png", png(10)), ("bright.png", png(200))])
    outcome = embed(cli, tmp_path / "run", tmp_path / "shards", "embed.backbone=planted_backbone:Planted")
    assert outcome.code == 0, outcome.err
    assert outcome.result["train"]["features_out"] == 1 and outcome.result["train"]["failed"] == 1
    line = json.loads((tmp_path / "run/embed/train/failed/part-00000.jsonl").read_text())
    assert line == {"key": "bright", "reason": "the backbone gave a non-finite feature"}


def test_sigterm_saves_and_exits_with_143(trained, tmp_path):
    command = [sys.executable, "-m", "sslscale.cli", "pretrain", *small_run(trained)]
    more = ["--run", str(tmp_path / "run"), "--runtime", "local", "pretrain.num_workers=1", "pretrain.steps=100000"]
    checkpoints = tmp_path / "run" / "pretrain" / "checkpoints.json"
    with subprocess.Popen([*command, *more], stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        deadline = time.monotonic() + 120
        while not checkpoints.is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert b"run the same command to go on" in err
    step = json.loads(checkpoints.read_text())["checkpoints"][-1]["state"]["step"]
    assert step > 4 and not (tmp_path / "run" / "pretrain" / "result.json").exists()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
