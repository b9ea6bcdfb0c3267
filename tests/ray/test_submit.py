"""`sslscale submit` to a cluster that `ray start --head` started on loopback, with a token as Ray's default has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from s3_server import free_port

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head: its dashboard's address, and the environment of a user who has its token."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home, dashboard = tmp_path_factory.mktemp("home"), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    token = {**environment, "RAY_AUTH_MODE": "token"}
    subprocess.run(["ray", "get-auth-token", "--generate"], env=token, check=True, capture_output=True)
    ports = [f"--{name}-port={free_port()}" for name in ("node-manager", "object-manager", "dashboard-agent-listen")]
    command = ["ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", *ports]
    command += ["--num-cpus=4", "--object-store-memory=200000000", "--dashboard-agent-grpc-port", str(free_port())]
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=token, stdout=log, stderr=log, start_new_session=True)
    head = Head(f"http://127.0.0.1:{dashboard}", environment)
    for _ in range(60):
        ready = submit(head, "--no-wait", "--", "--version", check=False)
        if ready.returncode == 0:
            break
    else:
        raise AssertionError(ready.stderr + (home / "head.log").read_text())
    yield head
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait(60)


def submit(head: Head, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "sslscale", "submit", "--address", head.address, *arguments]
    environment = {**head.environment, **more}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=check)


def test_a_run_streams_its_output_and_ends_as_it_does(head: Head, tmp_path: Path) -> None:
    folders = ["--run", str(tmp_path / "run"), f"pack.output={tmp_path / 'data'}", "pack.limit=300", "pack.workers=1"]
    small = ["pretrain.epochs=null", "pretrain.steps=2", "pretrain.num_workers=1", "pretrain.global_batch=64"]
    less = [
        "runtime.workers=1",
        "cluster.num_init=1",
        "index=null",
        "anomaly=null",
        "baselines=[]",
        f"datasets.train={tmp_path / 'data' / 'train'}",
    ]
    done = submit(head, "--", "run", "-c", "configs/quickstart.yaml", *folders, *small, *less, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 samples in 2 shards" in done.stdout
    assert "2 steps on 1 rank" in done.stdout
    assert (tmp_path / "run" / "report" / "index.html").is_file()


def test_a_failing_config_gives_its_exit_code(head: Head) -> None:
    done = submit(head, "--", "run", "-c", "configs/quickstart.yaml", "pretrain.epoch=3", check=False)
    assert done.returncode == 2
    assert "did you mean 'epochs'" in done.stdout


def test_without_waiting_the_job_is_named(head: Head) -> None:
    done = submit(head, "--no-wait", "--", "--version")
    assert "ray job logs" in done.stderr
    assert done.stdout == ""


def test_without_the_token_the_fix_is_named(head: Head, tmp_path: Path) -> None:
    done = submit(head, "--", "--version", check=False, HOME=str(tmp_path))
    assert done.returncode == 2
    assert "wants its token" in done.stderr


def test_a_cluster_that_is_not_there(head: Head) -> None:
    nowhere = Head(f"http://127.0.0.1:{free_port()}", head.environment)
    done = submit(nowhere, "--", "--version", check=False)
    assert done.returncode == 2
    assert "no Ray cluster at this address" in done.stderr
