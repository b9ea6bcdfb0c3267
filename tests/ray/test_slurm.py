"""launch/slurm.sbatch with stubs of `srun` and `scontrol` that run processes of this machine: two nodes, one run.

Where this user may mount, each node has a disk of its own for its working copies, so that nothing but the store of the
run is shared.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sslscale.rundir import RunDir, read_json

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && printf '%s\\n' node-a node-b
"""
# Options are for Slurm: what is run, and how often, is left. Every start is written down with the node that it is for
# and the CPUs that it has; the other nodes than the first do OTHERS_FIRST before it.
OWN_DISK = """unshare -m bash -c 'mount -t tmpfs disk "$TMPDIR" && exec "$@"' -"""
SRUN = """#!/bin/bash
tasks=1 where=all
while [[ "$1" == --* ]]; do
  case "$1" in --ntasks=*) tasks=${1#*=} ;; --nodelist=*) where=${1#*=} ;; --exclude=*) where=not-${1#*=} ;; esac
  shift
done
[[ "$1" == hostname ]] && { echo 127.0.0.1 fe80::1; exit; }
echo "$tasks $where $*" >> "$STARTED"
echo "$where ${SRUN_CPUS_PER_TASK:-1}" >> "$STARTED.cpus"
[[ "$where" == not-* ]] && eval "${OTHERS_FIRST:-}"
for _ in $(seq "$tasks"); do OWN_DISK "$@" & done
trap 'kill $(jobs -p)' TERM
wait
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes."""
    (tmp_path / "disk").mkdir()
    own_disk = OWN_DISK if may_mount(tmp_path / "disk") else ""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN.replace("OWN_DISK", own_disk))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "disk"),
        "RAY_TMPDIR": "/tmp",  # the paths of its sockets must be short
        "STARTED": str(tmp_path / "started"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": str(random.randrange(20_000)),  # the port follows from it
        "SLURM_CPUS_PER_TASK": "1",
    }


@pytest.fixture
def counting(allocation: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The same, with an `sslscale` that prints how many nodes it finds when it starts."""
    code = 'import os, ray; ray.init(os.environ["RAY_ADDRESS"]); print("nodes:", sum(n["Alive"] for n in ray.nodes()))'
    (tmp_path / "sslscale").write_text(f"#!/bin/bash\nexec python -c '{code}'\n")
    (tmp_path / "sslscale").chmod(0o755)
    return allocation


def may_mount(folder: Path) -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "disk", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def sbatch(
    environment: dict[str, str], *command: str, script: Path = ROOT / "launch" / "slurm.sbatch"
) -> subprocess.CompletedProcess[str]:
    started = ["bash", str(script), *command]
    return subprocess.run(started, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


def test_a_run_begins_when_every_node_has_joined(counting: dict[str, str], tmp_path: Path) -> None:
    done = sbatch(counting | {"OTHERS_FIRST": "sleep 10", "SLURM_CPUS_PER_TASK": "3"}, "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes: 2" in done.stdout
    assert sorted((tmp_path / "started.cpus").read_text().splitlines()) == ["node-a 3", "not-node-a 3"]


@pytest.mark.parametrize(
    ("others_first", "patience", "said"),
    [
        ("exit 1", 600, "error: Ray could not start on one of node-a node-b"),
        ("exec sleep 120", 15, "error: not all of node-a node-b joined Ray at 127.0.0.1:"),
    ],
)
def test_a_node_that_does_not_join_ends_the_job(
    counting: dict[str, str], tmp_path: Path, others_first: str, patience: int, said: str
) -> None:
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert "\npatience=600 " in text
    (tmp_path / "slurm.sbatch").write_text(text.replace("\npatience=600 ", f"\npatience={patience} "))
    done = sbatch(counting | {"OTHERS_FIRST": others_first}, "run", script=tmp_path / "slurm.sbatch")
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stderr and "fix:" in done.stderr
    assert "nodes:" not in done.stdout


def test_two_nodes_that_share_only_a_store_do_one_run(allocation: dict[str, str], s3: str, tmp_path: Path) -> None:
    small = ["pack.limit=300", "pack.workers=1", "pretrain.epochs=null", "pretrain.steps=3", "pretrain.global_batch=64"]
    folders = ["--run", f"{s3}/run", f"pack.output={s3}/data", f"datasets.train={s3}/data/train"]
    rest = ["index=null", "anomaly=null", "report=null", "baselines=[]", "runtime.workers=2", "cluster.num_init=1"]
    done = sbatch(allocation, "run", "-c", "configs/quickstart.yaml", *folders, *small, *rest, "embed.part_rows=100")
    assert done.returncode == 0, done.stdout + done.stderr
    started = (tmp_path / "started").read_text().splitlines()
    assert [line.split()[:5] for line in sorted(started)] == [
        ["1", "node-a", "ray", "start", "--head"],
        ["1", "not-node-a", "ray", "start", started[1].split()[4]],
    ]
    run = RunDir(f"{s3}/run").pull()
    assert read_json(run.path / "pretrain" / "result.json")["world_size"] == 2, "one CPU a node: on both"
    assert read_json(run.path / "embed" / "train" / "result.json")["features_out"] == 300
    assert read_json(run.path / "cluster" / "main" / "result.json")["num_samples"] == 300


def test_the_jobs_exit_code_is_the_runs(allocation: dict[str, str]) -> None:
    done = sbatch(allocation | {"SLURM_JOB_NODELIST": "node-a"}, "run", "-c", "configs/none.yaml")
    assert done.returncode == 2
    assert "no such config file" in done.stderr
