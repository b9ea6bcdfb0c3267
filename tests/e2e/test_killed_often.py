"""One training on two ranks that hangs, is killed ten times, is told to stop, and ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

SEED, STEPS, EVERY = 11, 120, 5
PATIENCE = 240
SETTINGS = [
    *("limit=200", "runtime.name=local", "pretrain.epochs=null", f"pretrain.steps={STEPS}", "pretrain.num_streams=4"),
    *(
        "pretrain.global_batch=32",
        "pretrain.log_every=1",
        f"pretrain.checkpoint_every={EVERY}",
        "pretrain.keep_every=40",
    ),
    *("pretrain.evaluate_samples=32", "pretrain.trace_samples=true", "pretrain.max_restarts=10"),
    *("pretrain.collective_timeout_s=20", "pretrain.num_workers=2", "pretrain.probe=null"),
    "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_type: deep, stem_width: 4}",
    "pretrain.objective={name: hanging_objective:HangsOnce, hidden_dim: 32, output_dim: 16}",
]


@dataclass
class Run:
    """A run directory, and the command that trains in it."""

    folder: Path
    data: Path
    process: subprocess.Popen | None = None
    log: list[str] = field(default_factory=list)

    @property
    def stage(self) -> Path:
        return self.folder / "run" / "pretrain"

    def command(self) -> list[str]:
        paths = [f"datasets.train={self.data}", f"run={self.folder / 'run'}"]
        return [
            *(sys.executable, "-m", "sslscale.cli", "pretrain", "-c", str(ROOT / "configs" / "quickstart.yaml")),
            *(*SETTINGS, *paths),
        ]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "e2e"), "HANG_ONCE": str(self.folder / "hung")}

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=self.environment())

    def output(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=PATIENCE)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step() >= step)

    def step(self) -> int:
        """The last step that rank 0 has logged."""
        lines = logged(self.stage / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def ranks(self) -> list[psutil.Process]:
        """The driver's child forks them."""
        return [rank for child in psutil.Process(self.process.pid).children() for rank in child.children()]

    def checkpoints(self) -> list[str]:
        listing = self.stage / "checkpoints.json"
        return [entry["name"] for entry in json.loads(listing.read_text())["checkpoints"]] if listing.is_file() else []

    def saving(self) -> bool:
        folder = self.stage / "checkpoints"
        return folder.is_dir() and any(
            path.name not in self.checkpoints() for path in folder.iterdir() if not path.name.startswith(".")
        )

    def weights(self) -> bytes:
        return (self.stage / "backbone" / "backbone.safetensors").read_bytes()


def logged(path: Path) -> list[dict]:
    """The whole lines of a log that is being written."""
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def kill_rank(run: Run, draw: random.Random) -> None:
    run.wait_for(lambda: len(run.ranks()) == 2)
    draw.choice(run.ranks()).kill()


def kill_driver(run: Run, draw: random.Random) -> None:
    """Its ranks end by themselves: two groups in one run directory would write over each other."""
    ranks = run.ranks()
    run.process.kill()
    run.process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    run.start()


@pytest.fixture(scope="module")
def data(packed_digits):
    return packed_digits(200)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("whole"), data)
    (run.folder / "hung").touch()
    run.start()
    assert run.wait() == 0, run.output()
    return run


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    draw = random.Random(SEED)
    run = Run(tmp_path_factory.mktemp("killed"), data)
    kills = [kill_rank] * 8 + [kill_driver] * 2
    draw.shuffle(kills)
    run.start()
    run.wait_for((run.folder / "hung").exists)  # no step is made in the seconds that the second process takes to start
    refused = subprocess.run(run.command(), capture_output=True, text=True, env=run.environment())
    run.log.append(f"a second process: {refused.returncode}, {refused.stderr}")
    furthest = 0
    for number, kill in enumerate(kills):
        furthest = max(furthest, run.step()) + draw.randint(1, 9)
        run.wait_for_step(furthest)
        if number % 5 == 0:
            run.wait_for(run.saving)
        else:
            time.sleep(draw.uniform(0, 0.2))
        run.log.append(f"{kill.__name__} at step {run.step()}{', in a save' if run.saving() else ''}")
        kill(run, draw)
    furthest = max(furthest, run.step()) + 1
    run.wait_for_step(furthest)
    run.process.send_signal(signal.SIGTERM)
    run.log.append(f"SIGTERM: {run.wait()} at step {run.step()}, {run.checkpoints()[-1]}")
    run.start()
    assert run.wait() == 0, run.output()
    return run


def test_ten_kills_leave_the_weights_of_a_run_never_killed(whole, killed):
    print("\n".join(killed.log))
    kills = [line for line in killed.log if line.startswith("kill_")]
    assert len(kills) == 10 and sum("in a save" in line for line in kills) >= 2
    assert killed.weights() == whole.weights()
    for name, value in (("metrics.jsonl", "loss"), ("samples.jsonl", "keys")):
        ours, theirs = (
            [(line["step"], line[value]) for line in logged(r.stage / name) if value in line] for r in (killed, whole)
        )
        assert ours == theirs and [step for step, _ in ours] == list(range(1, STEPS + 1))


def test_a_rank_that_hangs_is_lost_and_every_rank_says_where_it_was(killed):
    first = min((killed.stage / "stacks").iterdir())
    waited, hung = (path.read_text() for path in sorted(first.iterdir()))
    assert "Timeout (0:00:20)!" in hung and "hanging_objective.py" in hung
    assert "simclr.py" not in hung and "simclr.py" in waited


def test_a_second_process_is_refused(killed):
    line = next(line for line in killed.log if line.startswith("a second process"))
    assert "a second process: 2, error: the run directory is in use" in line


def test_sigterm_saves_first(killed):
    line, step = _stop(killed)
    assert line == f"SIGTERM: 143 at step {step}, step-{step:08d}"


def _stop(killed: Run) -> tuple[str, int]:
    line = next(line for line in killed.log if line.startswith("SIGTERM"))
    return line, int(line.partition("at step ")[2].partition(",")[0])


def test_checkpoints_are_kept_for_ever_and_the_newest(killed):
    *_, before_last, last = sorted({*range(0, STEPS + 1, EVERY), _stop(killed)[1]})
    assert killed.checkpoints() == [f"step-{step:08d}" for step in (40, 80, before_last, last)]
    names = [path.name for path in (killed.stage / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert sorted(names) == killed.checkpoints()


def test_restarts_are_counted(killed):
    output = (killed.folder / "log").read_text()
    assert "a rank was lost (ChildFailedError); restart 1, from the last checkpoint" in output
    assert output.count("a rank was lost") == 9  # eight were killed, and one hung
