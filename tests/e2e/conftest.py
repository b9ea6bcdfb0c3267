"""What the end-to-end tests share: the command line in this process, and one small run made once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# The quickstart, cut down to what a test has time for: the same stages, the same code, fewer steps.
SMALL = [
    "pack.samples_per_shard=256",
    "pretrain.epochs=null",
    "pretrain.steps=12",
    "pretrain.global_batch=64",
    "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 16, 16, 32], stem_type: deep, stem_width: 4}",
    "pretrain.checkpoint_every=4",
    "pretrain.evaluate_every=6",
    "pretrain.log_every=1",
    "embed.part_rows=500",
    "cluster.num_init=2",
]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The JSON object on the last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`cli("run", "-c", "x.yaml")` -> its Outcome, as the console script would end."""
    from sslscale.cli import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sslscale", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


def small_run(folder: Path, *more: str) -> list[str]:
    """The arguments of a small quickstart over folders of its own."""
    return [
        "-c",
        str(ROOT / "configs" / "quickstart.yaml"),
        "--run",
        str(folder / "run"),
        *SMALL,
        f"pack.output={folder / 'data'}",
        f"datasets.train={folder / 'data' / 'train'}",
        *more,
    ]


@pytest.fixture(scope="session")
def trained(ray_runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished small run (`run/`, on Ray with 2 ranks and 2 workers) and its shards (`data/`).

    Tests read it; a test that writes works on a copy, or under another `--name`.
    """
    from sslscale.config import load_config
    from sslscale.pipeline import planned_stages, run_stages

    folder = tmp_path_factory.mktemp("trained")
    arguments = small_run(folder)
    overrides = [argument for argument in arguments[4:] if "=" in argument]
    config = load_config(arguments[1], [*overrides, f"run={folder / 'run'}"])
    run_stages(planned_stages(config), config)
    return folder
