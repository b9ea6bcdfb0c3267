"""What docs/regimes.md and the heads of its configs say to type is what works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sslscale.config import RunConfig, load_config
from sslscale.shards.dataset import open_shards
from sslscale.shards.write import run_pack

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "regimes.md").read_text()
GOING_ON = sorted(path for path in (ROOT / "configs" / "regimes").glob("*/*.yaml") if path.stem != "alone")
ONE_CLASS = sorted((ROOT / "configs" / "one_class").glob("*/*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines]


def with_overrides_of_its_head(path: Path) -> RunConfig:
    """The config with what the lines `#   key=value ...` above it say."""
    head = path.read_text().partition("\n\n")[0].partition("\nbase:")[0]
    given = [word for line in re.findall(r"^#   (.*)$", head, re.MULTILINE) for word in line.split()]
    assert given
    return load_config(str(path), given)


def check_datasets(config: RunConfig) -> None:
    assert config.pretrain is not None
    named = {config.pretrain.dataset, *config.embed.datasets, *filter(None, [config.pretrain.held_out])}
    assert named <= config.datasets.keys()


@pytest.mark.parametrize("path", GOING_ON, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_regime_goes_on_from_the_run_that_its_head_names(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = with_overrides_of_its_head(path)
    simclr = ROOT / "configs" / "images" / path.parent.name / "simclr.yaml"
    assert config.pretrain.init_from == load_config(str(simclr)).run
    assert str(simclr.relative_to(ROOT)) in path.read_text()
    check_datasets(config)


@pytest.mark.parametrize("path", ONE_CLASS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_one_class_is_trained_on_and_measured_as_its_head_says(path):
    config = with_overrides_of_its_head(path)
    assert config.anomaly.method == "objective" and config.anomaly.normal_labels == [0]
    assert config.datasets["train"].endswith("/data/one_class/normal.json")
    assert config.embed.datasets == ["test"]
    check_datasets(config)


def test_the_commands_of_the_page_load():
    runs = [words for words in commands() if words[:3] == ["sslscale", "run", "-c"]]
    assert len(runs) == 3
    for _, _, _, config, *overrides in runs:
        check_datasets(load_config(str(ROOT / config), overrides))


def test_the_lists_of_the_page_hold_one_class_and_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python")
    pack = re.search(r"sslscale pack -c (\S+)", code)[1]
    run_pack(load_config(str(ROOT / pack), ["pack.workers=1"]).pack)
    exec(code, {})
    [words] = [words for words in commands() if any(word.startswith("datasets.test=") for word in words)]
    config = load_config(str(ROOT / words[3]), words[4:])
    labels, places = {}, {}
    for name, location in config.datasets.items():
        shards = open_shards(location)
        tars = [shards.open(number) for number in range(len(shards.shards))]
        labels[name] = [int(tar.read(record)["cls"]) for tar in tars for record in range(len(tar))]
        places[name] = {key for tar in tars for key in tar.keys}
    assert set(labels["train"]) == set(config.anomaly.normal_labels)
    assert set(labels["test"]) == set(range(10))
    assert not places["train"] & places["test"]
    assert len(labels["train"]) >= config.pretrain.global_batch and len(labels["test"]) > 800
