"""What the command line understands: flags as they stand, and the record of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sslscale.options import RuntimeKind
from sslscale.rundir import read_json
from sslscale.runtime.base import RUNTIMES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli("embed", "--dry-run")` -> exit code, stdout, stderr, as the console script would end."""
    from sslscale.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sslscale", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def resolved(cli: Callable[..., tuple[int, str, str]], *arguments: str) -> dict:
    code, out, err = cli(*arguments, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_dry_run_is_one_object_where_that_is_asked_for(cli) -> None:
    told = resolved(cli, "cluster", "cluster.num_clusters=7")
    assert told["stages"] == ["cluster"] and told["config"]["cluster"]["num_clusters"] == 7
    assert cli("cluster", "--dry-run")[1].endswith("# stages: cluster\n")


@pytest.mark.parametrize("run", ["/data/exp #3", "/data/a: b", "/data/${x}", "/data/[x]"])
def test_a_run_is_where_the_flag_says(cli, run: str) -> None:
    assert resolved(cli, "cluster", "--run", run)["config"]["run"] == run


@pytest.mark.parametrize("run", ["2024", "1e5", "on", "null"])
def test_a_folder_may_be_called_anything(cli, run: str) -> None:
    assert resolved(cli, "cluster", "--run", run)["config"]["run"] == str(Path(run).absolute())


def test_an_address_is_one_of_ray(cli) -> None:
    runtime = resolved(cli, "cluster", "runtime.name=local", "--address", "head:6379")["config"]["runtime"]
    assert (runtime["name"], runtime["address"]) == ("ray", "head:6379")
    code, _, err = cli("cluster", "--runtime", "local", "--address", "head:6379", "--dry-run")
    assert code == 2 and "--runtime local has no --address" in err


@pytest.mark.parametrize("verb", ["pack", "pretrain", "embed"])
def test_a_name_is_refused_where_answers_have_none(cli, verb: str) -> None:
    code, _, err = cli(verb, "--name", "x", "--dry-run")
    assert code == 2 and "--name has no effect here" in err


@pytest.mark.parametrize("verb", ["pack", "dedup", "pretrain", "embed", "index", "cluster", "anomaly", "reduce", "run"])
def test_every_verb_takes_what_all_share(cli, verb: str) -> None:
    shared = ("--runtime", "local", "--overwrite", "--dry-run", "--limit", "3", "--json", "-v")
    code, _, err = cli(verb, "-c", str(ROOT / "configs" / "quickstart.yaml"), *shared)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("search", "RUN", "--key", "a", "--output", "x.parquet"), "--output"),
        (("search", "RUN", "--key", "a", "--runtime", "ray"), "--runtime"),
        (("search", "RUN", "--key", "a", "--workers", "2"), "--workers"),
        (("search", "RUN", "--queries", "x", "--output", "y", "--key", "a"), "--key"),
        (("search", "RUN", "--queries", "x", "--output", "y", "--query", "a.png"), "--query"),
        (("search", "RUN", "--queries", "x", "--output", "y", "--dataset", "train"), "--dataset"),
        (("search", "RUN", "--query", "a.png", "--dataset", "train"), "--dataset"),
        (("features", "export", "RUN", "--format", "npy", "--output", "x", "--runtime", "ray"), "--runtime"),
        (("plan", "--matrix", "400"), "--matrix"),
        (("plan", "--vectors", "1000x4", "--gpus", "3"), "--gpus"),
        (("plan", "--vectors", "1000x4", "--ranks-per-node", "3"), "--ranks-per-node"),
    ],
)
def test_options_that_go_with_others_are_refused_without_them(cli, arguments: tuple[str, ...], option: str) -> None:
    code, _, err = cli(*arguments)
    assert code == 2 and f"{option} has no effect here" in err and "goes with" in err


def test_shards_of_queries_need_a_place_for_what_they_find(cli) -> None:
    code, _, err = cli("search", "RUN", "--queries", "shards")
    assert code == 2 and "--output FILE.parquet" in err


@pytest.mark.parametrize(
    "verb", [("cluster",), ("search", "RUN"), ("compact", "RUN"), ("features", "export", "RUN", "--format", "viewer")]
)
def test_a_misspelt_runtime_starts_nothing(cli, verb: tuple[str, ...]) -> None:
    code, _, err = cli(*verb, "--runtime", "rya")
    assert code == 2 and "'rya' is not one of 'local', 'ray'" in err


def test_the_runtimes_of_the_flag_are_those_that_there_are() -> None:
    assert tuple(RuntimeKind) == RUNTIMES


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a b", "../../x"])
def test_a_name_is_that_of_one_folder(cli, name: str, tmp_path: Path) -> None:
    for verb in (("cluster", "--run", str(tmp_path / "run"), "--overwrite"), ("search", str(tmp_path / "run"))):
        code, _, err = cli(*verb, "--name", name)
        assert code == 2 and "cannot be the name of an answer" in err
    assert list(tmp_path.iterdir()) == []


def test_the_recorded_command_can_be_given_again(cli, tmp_path: Path) -> None:
    run, output = str(tmp_path / "a run"), f"pack.output={tmp_path / 'of #1'}"
    code, _, err = cli("pack", "--run", run, "pack.source=digits", "pack.limit=5", "pack.workers=1", output)
    assert code == 0, err
    command = read_json(Path(run) / "manifest.json")["command"]
    assert command == f"pack --run '{run}' pack.source=digits pack.limit=5 pack.workers=1 '{output}'"
    assert (tmp_path / "of #1" / "train").is_dir()


def test_the_limit_of_pack_is_of_what_it_packs(cli) -> None:
    settings = ("pack", "pack.source=digits", "pack.output=data", "--limit", "3")
    assert resolved(cli, *settings)["config"]["pack"]["limit"] == 3
    assert resolved(cli, "cluster", "--limit", "3")["config"]["limit"] == 3


def test_a_limit_of_what_reads_no_samples_says_so(cli) -> None:
    code, _, err = cli("cluster", "--limit", "3", "--dry-run")
    assert code == 0 and "cluster takes all that are embedded" in err


@pytest.mark.parametrize("option", ["--store", "--network", "--matrix", "--memory"])
def test_a_rate_is_above_zero(cli, option: str) -> None:
    code, _, err = cli("plan", "--vectors", "1000x4", option, "0")
    assert code == 2 and f"{option} is a rate" in err


def test_an_interrupted_stage_says_how_to_go_on(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sslscale.pipeline as pipeline

    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(pipeline.STAGES, "cluster", interrupted)
    code, _, err = cli("cluster", "--run", str(tmp_path / "run"), "--runtime", "local")
    assert code == 130 and "run the same command to go on" in err
