"""The training step against a bare PyTorch loop with the same model, views and decode, side by side in one run.

Ours: shard plan, tar reading, decoding, keyed views, DeepSpeed engine (ZeRO 1), schedule, metrics. Bare: a list of the
same PNG bytes in memory, the same decoder, the same views, the same loss, torch's AdamW; no tar, no engine, no resume.
Both run in this process on the same threads; each turn is a fixed number of steps.

    python benchmarks/train_step.py [--steps 30] [--repeats 5] [--threads 2] [--objective simclr]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import interleave, write_result

from sslscale.config import PretrainConfig, RunConfig, load_config
from sslscale.models.image import Backbone
from sslscale.objectives import build_objective
from sslscale.objectives.base import Objective
from sslscale.pretrain.loop import Trainer
from sslscale.shards.dataset import open_shards
from sslscale.shards.decode import decode_image
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.shards.write import run_pack
from sslscale.views.base import Batch
from sslscale.views.image import to_float
from sslscale.views.keyed import KeyedRandom

ROOT = Path(__file__).parents[1]


def configure(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """configs/fashion_mnist.yaml on one rank, over 8,192 images."""
    config = load_config(
        str(ROOT / "configs" / "fashion_mnist.yaml"),
        [
            *(f"pack.output={folder}", "pack.limit=8192", f"datasets.train={folder}/train", "pretrain.probe=null"),
            *("pretrain.num_workers=1", f"pretrain.threads={arguments.threads}", "pretrain.evaluate_samples=64"),
            *("pretrain.epochs=null", "pretrain.steps=1000000", "pretrain.checkpoint_every=1000000"),
            *(f"pretrain.global_batch={arguments.batch}", f"pretrain.precision={arguments.precision}"),
        ],
    )
    if not Path(folder, "train").exists():
        assert config.pack is not None
        run_pack(config.pack)
    return config


class Ours(Trainer):
    """The real trainer, stopped and continued between turns."""

    def start(self) -> None:
        self.loader = self._loader({})
        self.batches = iter(self.loader)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            raw = next(self.batches)
            outcome = self.engine.step(self._micro_batches(raw), self.state.step)
            self.objective.after_step(0.5)
            self._advance(raw, 1.0, 0.0)
            assert outcome.applied


class Bare:
    """The shortest honest loop: what someone would write for one machine."""

    def __init__(self, config: RunConfig) -> None:
        assert config.pretrain is not None
        self.config: PretrainConfig = config.pretrain
        shards = open_shards(config.datasets["train"])
        spans = [Span(i, 0, int(count)) for i, count in enumerate(shards.counts)]
        self.samples = [item.data for item in read_spans(shards, spans) if isinstance(item, Sample)]
        torch.manual_seed(0)
        self.objective: Objective = build_objective(
            self.config.objective, Backbone(self.config.backbone), self.config.views
        )
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=self.config.optimizer.lr)
        self.pool = ThreadPoolExecutor(self.config.decode_threads)
        self.order = self._order()
        self.ahead = self.pool.submit(self._decode, list(itertools.islice(self.order, self.config.global_batch)))

    def _order(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self.samples)).tolist()

    def _decode(self, ids: list[int]) -> Any:
        size = self.config.views.size
        images = [torch.from_numpy(decode_image(self.samples[i], channels=1, size=size)) for i in ids]
        return torch.stack(images), torch.tensor(ids)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            images, ids = self.ahead.result()
            following = list(itertools.islice(self.order, self.config.global_batch))
            self.ahead = self.pool.submit(self._decode, following)
            random = KeyedRandom.of(0, torch.zeros_like(ids), ids)
            batch = Batch(self.objective.views(to_float(images), random), random)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self.objective(batch)["loss"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="steps a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as temporary:
        config = configure(arguments, Path(temporary) / "data")
        ours = Ours(Path(temporary) / "run", config)
        ours.start()
        bare = Bare(config)
        seconds = interleave(
            {"bare": lambda: bare.run(arguments.steps), "ours": lambda: ours.run(arguments.steps)}, arguments.repeats
        )
        wait = ours.loader.wait_seconds
        ours.loader.close()
    samples = arguments.steps * arguments.batch
    write_result(
        "train-step",
        {
            "what": "samples/s of a training step, ours and a bare loop with the same model, views and decode",
            "settings": vars(arguments),
            "samples_per_second": {name: samples / value for name, value in seconds.items()},
            "ratio": seconds["bare"] / seconds["ours"],
            "required": 0.90,
            "data_wait_share": wait / (seconds["ours"] * (arguments.repeats + 1)),
        },
    )


if __name__ == "__main__":
    main()
