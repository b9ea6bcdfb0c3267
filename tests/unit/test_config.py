from __future__ import annotations

from pathlib import Path

import pytest

from sslscale.config import PretrainConfig, dump_config, load_config
from sslscale.errors import UserError


def write(folder: Path, text: str) -> str:
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\npretrain:\n  epochs: 5\n  optimizer: {lr: 0.1}\n")
    config = load_config(path, ["pretrain.epochs=7", "pretrain.optimizer.name=sgd", "index=null"])
    assert config.pretrain is not None
    assert (config.seed, config.pretrain.epochs, config.index) == (3, 7, None)
    assert (config.pretrain.optimizer.lr, config.pretrain.optimizer.name) == (0.1, "sgd")
    assert config.pretrain.global_batch == 256


def test_what_is_dumped_loads_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(None, ["pretrain.epochs=2", "datasets.train=/data/train", "anomaly.k=5"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_file_lies_over_its_base_setting_by_setting(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", "seed: 1\nrun: runs/base\npretrain: {epochs: 5, optimizer: {lr: 0.1, name: sgd}}\n")
    over = write(tmp_path, "base: shared/config.yaml\nseed: 2\npretrain: {optimizer: {lr: 0.2}}\nindex: null\n")
    config = load_config(over, ["pretrain.epochs=7"])
    assert config.pretrain is not None
    assert (config.seed, config.pretrain.epochs, config.index) == (2, 7, None)
    assert config.run.endswith("runs/base")
    # a setting is replaced as a whole: the base's sgd is gone
    assert (config.pretrain.optimizer.lr, config.pretrain.optimizer.name) == (0.2, "adamw")


def test_a_base_that_is_missing_or_goes_in_circles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml, the base of"):
        load_config(write(tmp_path, "base: nowhere.yaml"))
    with pytest.raises(UserError, match="each other's base"):
        load_config(write(tmp_path, "base: config.yaml"))


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == load_config()


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("pretrian: {}", [], ["unknown setting 'pretrian'", "did you mean 'pretrain'?"]),
        ("pretrain: {epocs: 3}", [], ["'pretrain.epocs'", "did you mean 'epochs'?", "epocs=3"]),
        ("", ["pretrain.optimizer.momentun=1"], ["'pretrain.optimizer.momentun'", "did you mean 'momentum'?"]),
        ("cluster: {num_clusters: many}", [], ["'cluster.num_clusters'", "'many'", "valid integer"]),
        ("cluster: {num_clusters: 0}", [], ["'cluster.num_clusters'", "greater than or equal to 1"]),
        ("pretrain: {zero_stage: 4}", [], ["'pretrain.zero_stage'", "0, 1, 2 or 3"]),
        ("pretrain: {precision: fp16}", [], ["fp16 needs zero_stage 0"]),
        ("pack: {output: x}", [], ["'pack.source' is missing"]),
        ("cluster: {num_clusters: 0, nmu_init: 1}", [], ["1 more wrong setting"]),
        ("- 1\n- 2", [], ["a mapping of sections"]),
        ("pretrain: [", [], ["does not parse", "line "]),
        ("seed: ${nowhere}", [], ["does not parse", "nowhere"]),
        ("", ["seed"], ["section.key=value", "seed"]),
        ("", ["=3"], ["section.key=value"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text), overrides)
    assert error.value.exit_code == 2
    for part in expected:
        assert part in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("pretrain.num_workers=3 pretrain.num_streams=8", "num_workers \\(3\\) must divide num_streams \\(8\\)"),
        ("pretrain.global_batch=100 pretrain.num_streams=8", "num_streams \\(8\\) must divide global_batch \\(100\\)"),
        ("pretrain.epochs=3 pretrain.steps=5", "either epochs or steps"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_anything_starts(settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, settings.split())


def test_relative_folders_are_those_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["run=runs/a", "datasets.train=data/train", "datasets.far=s3://bucket/train"])
    assert config.run == str(tmp_path / "runs/a")
    assert config.datasets == {"train": str(tmp_path / "data/train"), "far": "s3://bucket/train"}


def test_identity_is_what_a_result_depends_on() -> None:
    config = PretrainConfig()
    identity = config.identity()
    assert identity == PretrainConfig(num_workers=4, device="cpu", log_every=3, prefetch=9).identity()
    assert identity != PretrainConfig(zero_stage=2).identity()
    assert not {"num_workers", "device", "checkpoint_every"} & identity.keys()
    assert {"objective", "backbone", "threads", "num_streams"} <= identity.keys()
