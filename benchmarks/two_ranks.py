"""Throughput of the real training loop on two ranks against one, one thread each, at the same global batch.

One rank and a group of two live side by side and take turns of some seconds; whoever waits sleeps. Every rank has one
core for all of its threads, as ranks of one machine divide its cores by themselves: one alone would otherwise read and
decode on the second core. What a rank spends inside collectives, waiting for the other one included, is its share of
communication. The machine's own limits stand beside it, measured in the same turns: what two separate runs reach that
each train with half of the batch and never meet, since two cores share one memory; and how much faster two
single-thread matrix products run side by side than one after the other. What else runs on the two cores strikes two
ranks harder than one, and those limits as hard; processor seconds, which are printed too, are not struck by it.

From more to less computing between two meetings of the ranks: a ViT-Tiny of 32 pixels, whose step is nearly all matrix
products, and the trainings of three configs with their own batches, whose every BatchNorm layer meets the other rank
twice a step: cifar10_context.yaml's ResNet-18, and the small ResNets of fashion_mnist.yaml and quickstart.yaml. These
three once more with batch_norm: stream, where no layer meets. All read digits, enlarged.

    python benchmarks/two_ranks.py [--cases vit_tiny quickstart] [--repeats 7] [--zero-stage 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import interleave, medians, ratios, take_turns, write_result

from sslscale.config import PackConfig, RunConfig, load_config
from sslscale.corpus import TOOLS
from sslscale.models.collectives import Neighbours
from sslscale.pretrain.loop import Trainer
from sslscale.shards.write import run_pack

ROOT = Path(__file__).parents[1]
BY_STREAM = "pretrain.batch_norm=stream"
CASES = {  # steps of a turn, a config, and what is changed in it
    "vit_tiny": (
        1,
        "quickstart.yaml",
        "pretrain.backbone={architecture: vit_tiny_patch16_224, channels: 1, stem: default,"
        " kwargs: {img_size: 32, patch_size: 4}}",
        *("pretrain.views.size=32", "pretrain.global_batch=64"),
    ),
    "cifar10_context": (1, "cifar10_context.yaml"),
    "fashion_mnist": (4, "fashion_mnist.yaml"),
    "quickstart": (10, "quickstart.yaml"),
    "cifar10_context_by_stream": (1, "cifar10_context.yaml", BY_STREAM),
    "fashion_mnist_by_stream": (4, "fashion_mnist.yaml", BY_STREAM),
    "quickstart_by_stream": (10, "quickstart.yaml", BY_STREAM),
}
TRIED = [  # for networks with BatchNorm, which stay below what is required
    "one reduction a BatchNorm and direction, of sums alone in the backward pass",
    "CPU ranks keep freed memory: no page faults in a step",
    "larger batches",
    "two passes less over the activations in the backward pass of gathered BatchNorm",
    "ranks keep to cores of their own, here also the one that is alone",
    "gloo's send and receive instead of its all-reduce: slower where ranks compute in between",
    "small exchanges through sockets of our own",
    "busy waiting for the other rank before the system's own: no difference beside the noise",
    "batch_norm: stream, where no layer meets (the cases by stream)",
    "the fast layout for images of one channel, and the same sums of blocks of rows on one rank as on two",
    "left: two cores that share a memory (see two separate runs), and DeepSpeed's own collectives through gloo",
]
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "broadcast")


def configure(case: str, arguments: argparse.Namespace, data: Path, share: int = 1) -> RunConfig:
    """The case's config, with its batch or one of `share` equal parts of it."""
    _, name, *changes = CASES[case]
    config = load_config(
        str(ROOT / "configs" / name),
        [
            *(*changes, f"datasets.train={data}", "pretrain.epochs=null", "pretrain.steps=1000000"),
            *("pretrain.probe=null", "pretrain.threads=1", "pretrain.num_streams=4", "pretrain.evaluate_samples=64"),
            *(f"pretrain.zero_stage={arguments.zero_stage}", f"pretrain.precision={arguments.precision}"),
        ],
    )
    assert config.pretrain is not None
    config.pretrain.global_batch //= share
    return config


class Clock:
    """Counts and times what this rank does inside torch.distributed."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        for name in COLLECTIVES:
            setattr(dist, name, self._timed(getattr(dist, name)))
        Neighbours.sum = self._timed(Neighbours.sum)  # type: ignore[method-assign]

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return collective(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


def serve(connection: Connection, core: int, rank: int, world_size: int, folder: str, config: dict[str, Any]) -> None:
    """One rank: trains as many steps as told; answers (seconds inside collectives, their number, processor seconds)."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}  # as launchers do
    clock = Clock()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    trainer = Trainer(Path(folder) / "pretrain", RunConfig(**config), TOOLS)
    with trainer._loader() as loader:
        batches = iter(loader)
        connection.send(())
        while steps := connection.recv():
            clock.seconds, clock.calls, start = 0.0, 0, time.process_time()
            for _ in range(steps):
                outcome = trainer.engine.step(trainer._micro_batches(next(batches)), trainer.state.step)
                assert outcome.applied
            connection.send((clock.seconds, clock.calls, time.process_time() - start))
    dist.destroy_process_group()


class Group:
    """Ranks that train together when they are told to."""

    def __init__(self, world_size: int, folder: str, config: RunConfig, core: int = 0) -> None:
        folder = tempfile.mkdtemp(dir=folder)
        (Path(folder) / "pretrain").mkdir()
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world_size)]
        self.connections = [ours for ours, _ in pipes]
        arguments = (world_size, folder, config.model_dump(mode="json"))
        self.processes = [
            context.Process(target=serve, args=(theirs, core + rank, rank, *arguments), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for connection in self.connections:
            connection.recv()
        self.inside: list[float] = []  # a turn: seconds inside collectives, of the rank that waits least
        self.processor: list[float] = []  # a turn: processor seconds of all ranks

    def start(self, steps: int) -> None:
        for connection in self.connections:
            connection.send(steps)

    def wait(self) -> None:
        inside, calls, processor = zip(*[connection.recv() for connection in self.connections], strict=True)
        self.calls = calls[0]
        self.inside.append(min(inside))
        self.processor.append(sum(processor))

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send(0)
            process.join()


def multiply(count: int) -> None:
    torch.set_num_threads(1)
    x = torch.randn(1024, 1024)
    for _ in range(count):
        x @ x


def side_by_side(repeats: int) -> float:
    """How many times as fast two processes multiply matrices as one of them."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        seconds = interleave(
            {"one": lambda: pool.apply(multiply, (40,)), "two": lambda: pool.map(multiply, [40, 40], chunksize=1)},
            repeats,
        )
    return 2 * seconds["one"] / seconds["two"]


def compare(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    steps = CASES[case][0]
    with tempfile.TemporaryDirectory() as folder:
        run_pack(PackConfig(source="digits", output=f"{folder}/data", workers=1))
        configs = [configure(case, arguments, Path(folder) / "data" / "train", share) for share in (1, 2)]
        one, two = (Group(ranks, folder, configs[0]) for ranks in (1, 2))
        halves = [Group(1, folder, configs[1], core) for core in range(2)]

        def turn(*groups: Group) -> None:
            for group in groups:
                group.start(steps)
            for group in groups:
                group.wait()

        turns = {"one": lambda: turn(one), "two": lambda: turn(two), "separate": lambda: turn(*halves)}
        seconds = take_turns(turns, arguments.repeats)
        for group in (one, two, *halves):
            group.close()
    assert configs[0].pretrain is not None
    batch = configs[0].pretrain.global_batch
    samples = steps * batch
    return {
        "global_batch": batch,
        "steps_a_turn": steps,
        "samples_per_second": {name: samples / value for name, value in medians(seconds).items()},
        "ratio": statistics.median(ratios(seconds["one"], seconds["two"])),
        "ratio_of_two_separate_runs": statistics.median(ratios(seconds["one"], seconds["separate"])),
        "share_of_communication": statistics.median(ratios(two.inside[1:], seconds["two"])),
        "collectives_a_step": two.calls / steps,
        "processor_seconds_a_step": {
            name: statistics.median(group.processor[1:]) / steps for name, group in (("one", one), ("two", two))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    arguments = parser.parse_args()
    cases = {}
    for case in arguments.cases:
        cases[case] = compare(case, arguments)
        print(case, cases[case], flush=True)
    write_result(
        "two-ranks",
        {
            "what": "samples/s of the training loop on two ranks and on one, one thread each, the same global batch",
            "settings": vars(arguments),
            "cases": cases,
            "required": 1.7,
            "tried": TRIED,
            "limit": {"two_matrix_products_side_by_side": side_by_side(arguments.repeats)},
        },
    )


if __name__ == "__main__":
    main()
