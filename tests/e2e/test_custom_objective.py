"""A user's own objective by its name, the guard against collapse, and weights to start from: on digits, one rank."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sslscale.config import RunConfig, validate
from sslscale.corpus import TOOLS
from sslscale.errors import StageError, UserError
from sslscale.models.export import load_backbone
from sslscale.pipeline import run_stages
from sslscale.pretrain.stage import run_pretrain
from sslscale.rundir import RunDir
from sslscale.runtime.local import LocalRuntime

BACKBONE = {
    "architecture": "resnet18",
    "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4},
    "stem": "small",
    "channels": 1,
}
COLLAPSING = '''
from sslscale.objectives.rotation import Rotation

class Collapsing(Rotation):
    """Its backbone gives one constant for all images from a share of the steps on."""

    def __init__(self, backbone, recipe, *, start: float):
        super().__init__(backbone, recipe)
        self.start = start

    def after_step(self, progress):
        if progress >= self.start:
            for parameter in self.backbone.parameters():
                parameter.data.zero_()
'''


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    pack = {"source": "digits", "output": str(folder), "limit": 256, "samples_per_shard": 128}
    values = {"run": str(folder / "run"), "pack": pack, "runtime": {"name": "local"}}
    run_stages(["pack"], validate(RunConfig, values))
    return folder / "train"


@pytest.fixture
def pretrain(digits, tmp_path, monkeypatch):
    """`pretrain(objective, run="a", **settings)`: trains in this process, gives the result."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(objective, run="run", **settings):
        section = {
            "objective": objective,
            "backbone": BACKBONE,
            "views": {"size": 8, "crop_scale": [0.6, 1.0]},
            "epochs": None,
            "steps": 12,
            "global_batch": 32,
            "num_streams": 2,
            "num_workers": 1,
            "zero_stage": 0,
            "log_every": 1,
            "evaluate_samples": 64,
            "keep_checkpoints": 1,
            **settings,
        }
        config = validate(RunConfig, {"datasets": {"train": str(digits)}, "pretrain": section})
        with RunDir(tmp_path / run) as folder:
            return run_pretrain(folder, config, LocalRuntime(), TOOLS)

    return call


def lines(folder):
    return [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]


def test_an_objective_in_a_users_own_module_runs_by_its_name(pretrain, tmp_path):
    shutil.copy(Path(__file__).with_name("example_objective.py"), tmp_path / "my_package_of_objectives.py")
    name = "my_package_of_objectives:AlignUniform"
    result = pretrain({"name": name, "output_dim": 16}, probe={"dataset": "train", "k": 5})
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert result["objective"]["name"] == name and result["healthy"]
    measures = {"rankme", "feature_std", "uniformity", "alpha_req", "alignment", "lidar"}
    assert set(result["measures"]) == measures | {"knn_accuracy", "linear_accuracy"}
    assert load_backbone(tmp_path / "run" / "pretrain" / "backbone").feature_dim == 16
    with pytest.raises(UserError, match="output_dim"):
        pretrain({"name": name, "output_dmi": 16}, run="other")


@pytest.mark.parametrize(("start", "unhealthy", "named"), [(0.0, [2, 4], "none"), (0.5, [10, 12], "step-00000008")])
def test_a_collapse_stops_the_run_within_two_evaluations(pretrain, tmp_path, start, unhealthy, named):
    (tmp_path / "collapsing.py").write_text(COLLAPSING)
    objective = {"name": "collapsing:Collapsing", "start": start}
    with pytest.raises(StageError, match="collapsed") as stopped:
        pretrain(objective, evaluate_every=2, checkpoint_every=4, steps=20)
    assert stopped.value.exit_code == 1 and named in stopped.value.fix
    evaluated = [line for line in lines(tmp_path / "run") if "eval_feature_std" in line]
    assert [line["step"] for line in evaluated if line["eval_feature_std"] < 0.01] == unhealthy
    if named != "none":
        load_backbone(tmp_path / "run" / "pretrain" / "checkpoints" / named / "backbone")


def test_the_last_healthy_checkpoint_outlives_newer_ones(pretrain, tmp_path):
    (tmp_path / "collapsing.py").write_text(COLLAPSING)
    guard = {"evaluations": 3}
    with pytest.raises(StageError, match="step-00000008"):
        pretrain({"name": "collapsing:Collapsing", "start": 0.5}, checkpoint_every=4, steps=20, collapse=guard)
    kept = sorted(path.name for path in (tmp_path / "run" / "pretrain" / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000016"]


@pytest.mark.parametrize("source", ["run", "run/pretrain/backbone", "weights.pth"])
def test_training_starts_from_given_weights_and_leaves_a_frozen_backbone_alone(pretrain, tmp_path, source):
    pretrain({"name": "rotation"}, steps=2)
    trained = tmp_path / "run" / "pretrain" / "backbone" / "backbone.safetensors"
    state = load_file(str(trained))
    torch.save({"state_dict": {**state, "fc.weight": torch.zeros(3, 16)}}, tmp_path / "weights.pth")
    pretrain({"name": "rotation"}, run="frozen", init_from=str(tmp_path / source), freeze_backbone=True, steps=2)
    after = load_file(str(tmp_path / "frozen" / "pretrain" / "backbone" / "backbone.safetensors"))
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert len({line["loss"] for line in lines(tmp_path / "frozen") if "loss" in line}) == 2
    parents = json.loads((tmp_path / "frozen" / "pretrain" / "stage.json").read_text())["parents"]
    assert len(parents["init_from"]) == 64
    assert ("heads" in parents) == (source == "run")  # weights alone come without


def test_weights_are_part_of_the_identity_by_their_hash(pretrain, tmp_path):
    pretrain({"name": "rotation"}, steps=1)
    backbone = tmp_path / "run" / "pretrain" / "backbone"
    shutil.copytree(backbone, tmp_path / "moved")
    first = pretrain({"name": "rotation"}, run="next", steps=1, init_from=str(backbone))
    assert pretrain({"name": "rotation"}, run="next", steps=1, init_from=str(tmp_path / "moved")) == first
    with pytest.raises(UserError, match="init_from"):
        pretrain({"name": "rotation"}, run="next", steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_from": "nowhere"}, "no weights"),
        ({"freeze_backbone": True}, "freeze_backbone needs init_from"),
        ({"backbone": {**BACKBONE, "mean": [0.1]}, "init_from": "run"}, r"mean: \[0.5\] there, \[0.1\] here"),
        ({"backbone": {**BACKBONE, "kwargs": {"layers": [1, 1, 1, 1]}}, "init_from": "run"}, "does not fit"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_starts(pretrain, tmp_path, change, message):
    if change.get("init_from") == "run":
        pretrain({"name": "rotation"}, steps=1)
        change = {**change, "init_from": str(tmp_path / "run")}
    with pytest.raises(UserError, match=message):
        pretrain({"name": "rotation"}, run="other", steps=1, **change)
    assert not (tmp_path / "other" / "pretrain").exists()
