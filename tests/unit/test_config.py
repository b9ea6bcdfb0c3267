from __future__ import annotations

from pathlib import Path
from typing import Any

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
        ("cluster: {num_clusters: [10]}", [], ["'cluster.num_clusters'", "[10]", "at least 2 items"]),
        ("pretrain: {num_workers: [4, 2]}", [], ["pretrain.num_workers: a range begins", "[4, 2]", "give [2, 4]"]),
        ("pretrain: {num_workers: [4]}", [], ["pretrain.num_workers: a range is two numbers", "[4]", "[low, high]"]),
        ("pretrain: {num_workers: [5, 7]}", [], ["a number in num_workers ([5, 7]) must divide num_streams (8)"]),
        ("pretrain: {backbone: {library: timmm}}", [], ["pretrain.backbone: ", "did you mean 'timm'?", "videomae"]),
        ("pretrain: {backbone: resnet18}", [], ["pretrain.backbone: ", "a section of settings", "'resnet18'"]),
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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("crop_scale=[1.0,0.2]", "give [0.2, 1.0]"),
        ("crop_scale=[0,1]", "greater than 0"),
        ("crop_scale=0.5", "two numbers"),
        ("crop_ratio=[0,1]", "greater than 0"),
        ("crop_ratio=[-2,-1]", "greater than 0"),
        ("crop_ratio=[2,1]", "give [1.0, 2.0]"),
        ("blur_sigma=[0,0]", "greater than 0"),
        ("blur_sigma=[2,1]", "give [1.0, 2.0]"),
        ("erase_scale=[0.5,0.1]", "give [0.1, 0.5]"),
        ("noise=.inf", "finite"),
    ],
)
def test_a_recipe_that_makes_no_views_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [f"pretrain.views.{setting}"])
    assert f"pretrain.views.{setting.partition('=')[0]}" in str(error.value)
    assert message in str(error.value)


def test_a_range_may_be_a_single_value() -> None:
    config = load_config(None, ["pretrain.views.crop_scale=[1,1]", "pretrain.num_workers=[2,2]"])
    assert config.pretrain is not None
    assert (config.pretrain.views.crop_scale, config.pretrain.world_sizes) == ((1.0, 1.0), [2])


def test_blur_needs_a_neighbour() -> None:
    with pytest.raises(UserError, match=r"pretrain\.views: blur needs views of 2 pixels"):
        load_config(None, ["pretrain.views={size: 1, blur: 0.5}"])
    load_config(None, ["pretrain.views={size: 1}"])
    load_config(None, ["pretrain.views={size: 2, blur: 0.5}"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=-1", "greater than or equal to 0"),
        ("seed=2147483648", "less than 2147483648"),
        ("pretrain.optimizer.lr=.nan", "finite"),
        ("pretrain.optimizer.betas=[0.9,1.0]", "less than 1"),
        ("pretrain.backbone.std=[0.0]", "greater than 0"),
    ],
)
def test_numbers_that_no_library_takes_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [setting])


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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("report.title=A #1: x", "A #1: x"),
        ("report.title=2024", "2024"),
        ("report.title=1e5", "1e5"),
        ("report.title=on", "on"),
        ("report.title=a: b", "a: b"),
        ("report.title=a: b: [c", "a: b: [c"),
        ("report.title=[x]", "[x]"),
        ("report.title={x}", "{x}"),
        ("report.title=${x}", "${x}"),
        (r"report.title=\${x} \\${", r"\${x} \\${"),
        ("report.title=a=b", "a=b"),
        ("report.title='x'", "'x'"),
        ("report.title=null", None),
        ("datasets.train=/data/a #1", "/data/a #1"),
        ("cluster.method=lloyd", "lloyd"),
        ("pretrain.backbone.architecture=1e5", "1e5"),
        ("reduce.map=null", None),
        ("pretrain.epochs=1e1", 10),
        ("embed.datasets=[a, b] # those", ["a", "b"]),
        ("pretrain.objective.temperature=1e-1", 0.1),
        ("pretrain.zero_stage=2", 2),
    ],
)
def test_a_text_is_taken_as_it_stands_and_the_rest_is_yaml(tmp_path: Path, override: str, value: object) -> None:
    config = load_config(None, [override])
    found: Any = config
    for part in override.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_flags_are_set_as_they_are_and_seen_by_what_refers_to_them(tmp_path: Path) -> None:
    path = write(tmp_path, "run: runs/a\npack: {source: digits, output: '${run}/data'}\n")
    config = load_config(path, ["run=/b"], {"run": "/c #1 ${x}", "limit": 5})
    assert (config.run, config.limit) == ("/c #1 ${x}", 5)
    assert config.pack is not None and config.pack.output == "/c #1 ${x}/data"


def test_every_path_is_the_callers_and_a_name_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("own", "pixels", "pretrain"):
        (tmp_path / folder).mkdir()
    overrides = ["storage.cache=cache", "pack.source=text", "pack.path=texts", "pack.output=out"]
    config = load_config(None, [*overrides, "baselines=[pixels, own, ./pixels, 'timm:a/b', 's3://x/y']"])
    assert config.pack is not None
    assert (config.storage.cache, config.pack.path) == (str(tmp_path / "cache"), str(tmp_path / "texts"))
    paths = [str(tmp_path / "own"), str(tmp_path / "pixels")]
    assert config.baselines == ["pixels", *paths, "timm:a/b", "s3://x/y"]
    for given, expected in (
        ("pretrain", "pretrain"),
        ("pixles", "pixles"),
        ("module:Class", "module:Class"),
        ("own", paths[0]),
        ("models/a.pt", str(tmp_path / "models/a.pt")),
        ("./a:b", str(tmp_path / "a:b")),
    ):
        assert load_config(None, [f"embed.backbone={given}"]).embed.backbone == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster={method: ward, num_clusters: [2, 3]}", "several numbers of clusters are tried by flat k-means only"),
        ("cluster.balanced=true", "balanced needs method=hierarchical, and method is minibatch"),
        ("anomaly={method: all_pairs, reference: [train]}", "all_pairs searches the scored datasets in themselves"),
        ("reduce={code_bytes: [0]}", "'reduce.code_bytes.0' has a wrong value"),
        ("datasets={a/b: /data}", "'a/b' cannot be the name of a dataset"),
        ("datasets={../../x: /data}", "'../../x' cannot be the name of a dataset"),
        ("datasets={'': /data}", "'' cannot be the name of a dataset"),
        *((f"{section}.datasets=[]", "has a wrong value") for section in ("index", "cluster", "anomaly", "embed")),
        ("anomaly.reference=[]", "has a wrong value"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_when_read(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_config(None, [override])


def test_a_dataset_may_have_any_other_name() -> None:
    datasets = load_config(None, ["datasets={train set: /a, año-2024: /b, x.y: /c}"]).datasets
    assert list(datasets) == ["train set", "año-2024", "x.y"]
