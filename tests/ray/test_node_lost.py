"""Nodes of a Ray cluster that die while it trains, embeds and clusters. Each node is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 300
STEPS = 60
SETTINGS = [
    *("limit=400", "pretrain.epochs=null", f"pretrain.steps={STEPS}", "pretrain.num_streams=4", "pretrain.probe=null"),
    *("pretrain.global_batch=32", "pretrain.log_every=1", "pretrain.checkpoint_every=4", "pretrain.trace_samples=true"),
    *("pretrain.evaluate_samples=32", "embed.part_rows=8", "embed.batch_size=8", "baselines=[]", "pack=null"),
    *("index=null", "cluster=null", "anomaly=null", "reduce=null", "report=null"),
    "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_type: deep, stem_width: 4}",
    "pretrain.objective={name: simclr, hidden_dim: 32, output_dim: 16}",
]


class Nodes:
    """A head without places, and nodes with one place each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 2**28},
        )
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> None:
        self.cluster.add_node(num_cpus=1, object_store_memory=2**27)

    def running(self, what: str) -> list:
        """The nodes that run an actor whose process is called so."""
        return [node for node in self.cluster.worker_nodes if any(what in name for name in processes(node))]

    def kill_one(self, what: str) -> None:
        self.cluster.remove_node(self.running(what)[0], allow_graceful=False)

    def drain_one(self, what: str) -> None:
        """Gives the notice that a cloud gives before it takes a machine away."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        deadline = ["--node-id", self.running(what)[-1].node_id, "--deadline-remaining-seconds", "120"]
        subprocess.run([*command, *notice, *deadline], check=True, capture_output=True)


def processes(node) -> list[str]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    names = []
    for child in raylet.children(recursive=True):
        try:
            names.append(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return names


class Command:
    """`sslscale VERB` on the cluster, or without Ray."""

    def __init__(self, verb: str, folder: Path, data: Path, *more: str) -> None:
        self.run = folder / "run"
        folder.mkdir(exist_ok=True)
        self._log = folder / "log"
        command = [sys.executable, "-m", "sslscale.cli", verb, "-c", str(ROOT / "configs" / "quickstart.yaml")]
        paths = [f"datasets.train={data}", "--run", str(self.run)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *SETTINGS, *paths, *more], stdout=log, stderr=log, env={**os.environ, "RAY_DEDUP_LOGS": "0"}
            )

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.02)

    def finish(self) -> None:
        assert self.process.wait(timeout=PATIENCE) == 0, self.output()[-3000:]

    def output(self) -> str:
        return self._log.read_text()

    def step(self) -> int:
        lines = self.logged("metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def parts(self) -> int:
        return len(list((self.run / "embed" / "train" / "done").glob("part-*")))

    def logged(self, name: str) -> list[dict]:
        path = self.run / "pretrain" / name
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def iterations(self) -> int:
        path = self.run / "cluster" / "main" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def samples(self) -> dict[int, list[str]]:
        return {line["step"]: line["keys"] for line in self.logged("samples.jsonl")}

    def result(self) -> dict:
        return json.loads((self.run / "pretrain" / "result.json").read_text())

    def features(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.run / "embed" / "train").glob("part-*.npy")}


@pytest.fixture(scope="module")
def data(packed_digits):
    return packed_digits(400)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    command = Command("run", tmp_path_factory.mktemp("whole"), data, "--runtime", "local")
    command.finish()
    return command


@pytest.fixture(scope="module")
def nodes():
    nodes = Nodes(3)
    yield nodes
    nodes.cluster.shutdown()


@pytest.mark.ray
def test_nodes_lost_in_training_and_embedding_change_nothing_where_one_is_spare(whole, nodes, data, tmp_path):
    command = Command("run", tmp_path / "spare", data, "--runtime", "ray", "--address", nodes.address)
    command.wait_for(lambda: command.step() >= 10)
    nodes.kill_one("RayTrainWorker")
    nodes.add()
    command.wait_for(lambda: command.parts() >= 3)
    nodes.kill_one("WorkerHost")
    assert command.parts() < 50
    command.finish()
    assert command.result()["restarts"] == 1 and command.result()["world_size"] == 2
    assert command.features() == whole.features() and len(command.features()) == 50


@pytest.mark.ray
def test_a_node_lost_among_iterations_of_kmeans_changes_nothing(whole, nodes, data, tmp_path):
    settings = "cluster={num_clusters: 60, init: random, method: lloyd, num_init: 10, tolerance: 0}"
    commands = []
    for name, where in (("one", ["--runtime", "local"]), ("lost", ["--runtime", "ray", "--address", nodes.address])):
        shutil.copytree(whole.run / "embed", tmp_path / name / "run" / "embed")
        commands.append(Command("cluster", tmp_path / name, data, *where, settings))
        if name == "lost":
            commands[-1].wait_for(lambda: commands[-1].iterations() >= 2)
            nodes.kill_one("WorkerHost")
            killed_at = commands[-1].iterations()
            nodes.add()  # for the tests to come
        commands[-1].finish()
    assert killed_at < commands[0].iterations() == commands[1].iterations()
    one, lost = ([path.read_bytes() for path in sorted((c.run / "cluster").rglob("*.npy"))] for c in commands)
    assert one == lost and len(one) == 1 + 2 * 50


@pytest.mark.ray
def test_a_group_goes_on_with_the_nodes_that_are_left(whole, nodes, data, tmp_path):
    while len(nodes.cluster.worker_nodes) > 2:
        nodes.cluster.remove_node(next(iter(nodes.cluster.worker_nodes)))
    ranks = ["--runtime", "ray", "--address", nodes.address, "pretrain.num_workers=[1, 2]"]
    command = Command("pretrain", tmp_path / "shrunk", data, *ranks)
    command.wait_for(lambda: command.step() >= 10)
    nodes.kill_one("RayTrainWorker")
    command.finish()
    assert command.result()["restarts"] == 1 and command.result()["world_size"] == 1
    assert command.samples() == whole.samples() and list(command.samples()) == list(range(1, STEPS + 1))


@pytest.mark.ray
def test_ranks_save_and_move_before_their_node_is_taken_away_and_stop_when_told_to(nodes, data, tmp_path):
    while len(nodes.cluster.worker_nodes) < 2:
        nodes.add()
    more = ["--runtime", "ray", "--address", nodes.address, "pretrain.num_workers=[1, 2]", "pretrain.steps=2000"]
    command = Command("pretrain", tmp_path / "drained", data, *more)
    # ranks of an earlier test may still be ending on a node that has none of these
    command.wait_for(lambda: command.step() >= 3 and len(nodes.running("RayTrainWorker")) == 2)
    nodes.drain_one("RayTrainWorker")
    command.wait_for(lambda: "the ranks have saved, and start again where there is room" in command.output())
    moved_at = command.step()
    command.wait_for(lambda: command.step() > moved_at)
    command.process.terminate()
    assert command.process.wait(timeout=PATIENCE) == 143 and command.step() < 2000
    assert "a rank was lost" not in command.output()
    listing = json.loads((command.run / "pretrain" / "checkpoints.json").read_text())
    assert listing["checkpoints"][-1]["state"]["step"] == command.step()
    assert list(command.samples()) == list(range(1, command.step() + 1))
