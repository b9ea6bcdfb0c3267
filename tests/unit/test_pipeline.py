"""What a command leaves in a run besides its stages' results, and what it refuses before the first of them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sslscale.config import RunConfig, dump_config, load_config
from sslscale.config.load import BACKBONE_NAMES
from sslscale.errors import UserError
from sslscale.pipeline import planned_stages, preflight, run_stages
from sslscale.rundir import RunDir, read_json
from sslscale.status import run_status

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
SMALL = [
    *("runtime.name=local", "runtime.workers=1", "embed.backbone=pixels", "embed.size=4", "embed.channels=1"),
    *("cluster.num_clusters=4", "cluster.num_init=1", "cluster.device=cpu", "anomaly.k=3", "index.device=cpu"),
]


@pytest.fixture(scope="module")
def shards(packed_digits: Any) -> Path:
    return packed_digits(60)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Any:
    """`config("cluster.num_clusters=3")`: that of a run over a few digits, as their pixels."""

    def make(*overrides: str) -> RunConfig:
        return load_config(None, [*SMALL, f"datasets.train={shards}", f"run={tmp_path / 'run'}", *overrides])

    return make


def recorded(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


# ------------------------------------------------------------------ pack


def packing(tmp_path: Path, run: str) -> RunConfig:
    pack = ["pack.source=digits", "pack.limit=20", f"pack.output={tmp_path / 'data'}", "pack.workers=1"]
    return load_config(None, [*pack, f"run={tmp_path / run}", "pretrain.epochs=3", f"datasets.train={tmp_path}/x"])


def test_a_run_is_there_while_its_data_is_packed_and_its_config_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sslscale.shards import write

    seen, write_all = [], write._write_all

    def watched(*arguments: Any) -> None:
        seen.append(run_status(str(tmp_path / "run")).status)
        write_all(*arguments)

    monkeypatch.setattr(write, "_write_all", watched)
    config = packing(tmp_path, "run")
    run_stages(["pack"], config)
    assert seen == ["running"]
    assert run_status(str(tmp_path / "run")).status == "done"
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config


def test_data_that_another_run_has_packed_leaves_a_config_too(tmp_path: Path) -> None:
    run_stages(["pack"], packing(tmp_path, "first"))
    config = packing(tmp_path, "second")
    run_stages(["pack"], config)
    assert load_config(str(tmp_path / "second" / "config.yaml")) == config
    assert run_status(str(tmp_path / "second")).status == "done"


# ------------------------------------------------------------------ what a later command changes


def test_an_answer_of_its_own_name_leaves_the_run_as_it_was_configured(config: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_stages(["embed", "cluster"], config())
    before = (run / "config.yaml").read_bytes()
    run_stages(["cluster"], config("cluster.num_clusters=3", "limit=7"), name="three", command="cluster --name three")
    assert (run / "config.yaml").read_bytes() == before
    record = read_json(run / "cluster" / "three" / "stage.json")
    assert record["settings"]["num_clusters"] == 3 and record["command"] == "cluster --name three"
    assert {"time", "git_commit"} <= record.keys()
    run_stages(["embed", "cluster"], load_config(str(run / "config.yaml")))  # is not refused


def test_a_later_command_changes_its_own_sections_only(config: Any, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = config()
    run_stages(["embed"], first, command="embed")
    more = ["runtime.workers=2", "limit=50", "seed=3", "cluster.num_clusters=3", f"datasets.again={shards}"]
    run_stages(["anomaly"], config("anomaly.k=5", *more), command="anomaly")
    kept = load_config(str(run / "config.yaml"))
    assert kept.anomaly is not None and kept.anomaly.k == 5
    assert kept.datasets.keys() == {"train", "again"}
    assert kept == first.model_copy(update={"anomaly": kept.anomaly, "datasets": kept.datasets})
    assert read_json(run / "manifest.json")["command"] == "anomaly"
    assert read_json(run / "embed" / "train" / "stage.json")["command"] == "embed"


def test_a_command_records_what_it_has_begun(config: Any, tmp_path: Path) -> None:
    manifest = tmp_path / "run" / "manifest.json"
    run_stages(["embed", "cluster"], config())
    assert read_json(manifest)["begun"] == ["embed/train", "cluster/main"]
    run_stages(["cluster", "anomaly"], config())
    assert read_json(manifest)["begun"] == ["anomaly/main"]


def test_an_interrupt_ends_as_a_signal_does(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslscale.anomaly.knn import KNNWorker
    from sslscale.errors import Interrupted

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    run_stages(["embed"], config())
    monkeypatch.setattr(KNNWorker, "score", interrupt)
    with pytest.raises(Interrupted) as stopped:
        run_stages(["anomaly"], config())
    assert stopped.value.exit_code == 130
    assert run_status(config().run).status == "interrupted"


def test_a_run_is_done_when_its_stages_are(config: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run_stages(["embed"], config())
    begun = run.open_stage("pretrain", None, {}, {})
    run.record(status="interrupted")
    run_stages(["cluster"], config())
    assert run_status(str(run.path)).status == "interrupted"
    begun.finish({})
    run_stages(["cluster"], config())
    assert run_status(str(run.path)).status == "done"


# ------------------------------------------------------------------ baselines


def test_baselines_are_compared_with_clusters_or_not_at_all() -> None:
    assert "baselines" in planned_stages(load_config(QUICKSTART))
    assert "baselines" not in planned_stages(load_config(QUICKSTART, ["cluster=null"]))


def test_a_baseline_is_what_it_is_and_lies_in_the_run(config: Any, tmp_path: Path) -> None:
    """Neither projected nor written beside the backbone that it names; the run knows that it is at work."""
    import torch

    model = tmp_path / "models" / "flat.pt"
    model.parent.mkdir()
    torch.jit.script(torch.nn.Flatten()).save(str(model))
    settings = config("embed.pca=3", f"baselines=[pixels, {model}]")
    run_stages(["embed", "cluster"], settings)
    run = tmp_path / "run"
    (run / "config.yaml").unlink()
    results = run_stages(["baselines"], settings, command="baselines")["baselines"]
    assert results.keys() == {"pixels", str(model)}
    assert [path.name for path in model.parent.iterdir()] == ["flat.pt"]
    folders = {path.name for path in (run / "baselines").iterdir()}
    assert "pixels" in folders and len(folders) == 2 and all("flat-pt" in name for name in folders - {"pixels"})
    for folder in folders:
        embedded = run / "baselines" / folder / "embed" / "train"
        assert read_json(embedded / "result.json")["dim"] == 16  # the four by four pixels of each
        assert read_json(embedded / "stage.json")["command"] == "baselines"
    assert recorded(run)["embed"]["pca"] == 3


@pytest.mark.parametrize("name", ["..", ".", "/", "/a/b", "a/b", "~/a"])
def test_no_baseline_lies_anywhere_else(name: str) -> None:
    from sslscale.pipeline import _folder_name

    folder = _folder_name(name)
    assert "/" not in folder and folder not in (".", "..") and folder != _folder_name(name + "x")


def test_bare_words_that_name_a_backbone_are_known_to_the_config() -> None:
    from sslscale.models.handcrafted import HANDCRAFTED

    assert {"pretrain", *HANDCRAFTED} == BACKBONE_NAMES


# ------------------------------------------------------------------ before anything starts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed.datasets=[trian]", "no dataset 'trian'; did you mean 'train'"),
        ("pretrain.dataset=trian", "no dataset 'trian'"),
        ("pretrain.probe={dataset: tset}", "no dataset 'tset'"),
        ("pretrain.held_out=tset", "no dataset 'tset'"),
        ("dedup={datasets: [tset]}", "no dataset 'tset'"),
        ("index.datasets=[tset]", "not embedded\n.*'tset'"),
        ("cluster.datasets=[tset]", "not embedded\n.*'tset'"),
        ("anomaly.reference=[tset]", "not embedded\n.*'tset'"),
        ("reduce={datasets: [tset]}", "not embedded\n.*'tset'"),
        ("index.factory=IVF8,Flta", "factory string"),
        ("embed.pca=128", "fewer dimensions than the backbone has"),
        ("index.factory=PQ7", "factory string"),  # of 128 dimensions
        ("pretrain.objective.temprature=1", "temprature.*did you mean 'temperature'"),
        ("pretrain.micro_batch=16", "cannot accumulate"),
        ("embed.backbone=pixles", "no backbone 'pixles'; did you mean 'pixels'"),
        ("baselines=[hgo]", "no backbone 'hgo'; did you mean 'hog'"),
        ("reduce={map: umap}", r"sslscale\[maps\]"),
        ("cluster.method=objective", "gives no cluster_probs\n.*simclr"),
        ("anomaly.method=objective", "gives no score\n.*simclr"),
    ],
)
def test_what_a_later_stage_would_refuse_starts_nothing(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    folders = [f"run={tmp_path / 'run'}", f"pack.output={tmp_path / 'data'}"]
    config = load_config(QUICKSTART, [*folders, override])
    with pytest.raises(UserError, match=message) as refused:
        run_stages(planned_stages(config), config)
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "wanted"), [("cluster", "cluster_probs"), ("anomaly", "score")])
def test_an_answer_that_features_cannot_give_replaces_none(config: Any, stage: str, wanted: str) -> None:
    run_stages(["embed", stage], config())
    with pytest.raises(UserError, match=f"gives no {wanted}"):
        run_stages([stage], config(f"{stage}.method=objective"), overwrite=True)
    assert run_status(config().run).status == "done"
    assert run_stages([stage], config())[stage]["num_samples"] == 60


def test_what_a_run_has_embedded_before_may_be_named(config: Any) -> None:
    run_stages(["embed"], config())
    later = config("embed.datasets=[other]", "anomaly.reference=[train]", "datasets.other=/nowhere")
    preflight(["embed", "anomaly"], later)
    with pytest.raises(UserError, match=r"not embedded\n.*\n.*allowed: other, train"):
        preflight(["embed", "anomaly"], later.model_copy(update={"anomaly": config("anomaly.reference=[x]").anomaly}))


def test_checks_load_no_more_than_the_stages_need(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config()))
    arguments = ["cluster", "-c", str(tmp_path / "config.yaml"), "--dry-run"]
    code = (
        f"import sys; sys.argv[1:] = {arguments!r}\nfrom sslscale.cli import main\ntry: main()\nexcept SystemExit: pass"
    )
    script = f"{code}\nprint('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-2:] == ["# stages: cluster", "False"], shlex.join(arguments)


def test_a_report_of_nothing_is_refused(config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to report on"):
        run_stages(["report"], config())
    assert list(tmp_path.iterdir()) == []
    run_stages(["embed", "cluster"], config())
    run_stages(["cluster"], config("cluster.num_clusters=3"), name="three")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"did you mean 'three'.*\n.*thre\n.*allowed: main, three"):
        run_stages(["report"], config(), name="thre")
    assert sorted(tmp_path.rglob("*")) == before
