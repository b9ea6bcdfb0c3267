"""Every objective's training step against a bare PyTorch loop with the same model, views and decode, side by side.

Ours: shard plan, tar reading, decoding, keyed views, DeepSpeed engine (ZeRO 1), schedule, metrics. Bare: a list of the
same bytes in memory, the same decoder, the same views, the same loss, torch's AdamW; no tar, no engine, no resume.
Both run in this process on the same threads; each turn is a fixed number of steps. The models and losses are those of
the recipes: configs/images/fashion_mnist/ over 8,192 images of Fashion-MNIST (colorization, which needs colour, has
configs/cifar10_colorization.yaml), configs/text/ over 8,192 glosses of WordNet, configs/video/ over 1,024 clips.

    python benchmarks/train_step.py [--objectives simclr dino] [--steps 8] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import interleave, write_result

from sslscale.config import PretrainConfig, RunConfig, load_config
from sslscale.corpus import TOOLS
from sslscale.models.export import build_backbone
from sslscale.objectives import OBJECTIVES, build_objective
from sslscale.objectives.base import Objective
from sslscale.pretrain.loop import FITTED, Trainer
from sslscale.pretrain.stage import fit_backbone
from sslscale.shards.dataset import open_shards
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.shards.write import run_pack
from sslscale.views.base import Batch, as_input
from sslscale.views.keyed import KeyedRandom

CONFIGS = Path(__file__).parents[1] / "configs"


# objective -> its recipe and the source that it is measured on, where they are not Fashion-MNIST's
RECIPES = {
    "colorization": ("cifar10_colorization.yaml", "fashion-mnist"),
    **{name: (f"text/{name}.yaml", "wordnet") for name in ("causal_lm", "masked_lm", "simcse")},
    **{name: (f"video/{name}.yaml", "moving-digits") for name in ("frame_order", "video_mae")},
}
LIMITS = {"moving-digits": 1024}


def configure(objective: str, arguments: argparse.Namespace, data: Path) -> RunConfig:
    """The objective's recipe on one rank, over samples of its source in DATA/<source>."""
    recipe, source = RECIPES.get(objective, (f"images/fashion_mnist/{objective}.yaml", "fashion-mnist"))
    data, limit = data / source, LIMITS.get(source, 8192)
    config = load_config(
        str(CONFIGS / recipe),
        [
            *(f"pack.source={source}", f"pack.output={data}", f"pack.limit={limit}", f"datasets.train={data}/train"),
            *("pretrain.num_workers=1", f"pretrain.threads={arguments.threads}", "pretrain.zero_stage=1"),
            *("pretrain.evaluate_samples=64", "pretrain.epochs=null", "pretrain.steps=1000000"),
            *("pretrain.checkpoint_every=1000000", f"pretrain.global_batch={arguments.batch}"),
            f"pretrain.precision={arguments.precision}",
        ],
    )
    if not (data / "train").exists():
        assert config.pack is not None
        run_pack(config.pack)
    return config


class Ours(Trainer):
    """The real trainer, stopped and continued between turns."""

    def start(self) -> None:
        self.loader = self._loader()
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

    def __init__(self, config: RunConfig, files: Path) -> None:
        assert config.pretrain is not None
        self.config: PretrainConfig = config.pretrain
        shards = open_shards(config.datasets["train"])
        spans = [Span(i, 0, int(count)) for i, count in enumerate(shards.counts)]
        self.samples = [item.data for item in read_spans(shards, spans) if isinstance(item, Sample)]
        torch.manual_seed(0)
        backbone = build_backbone(self.config.backbone, files)
        size = self.config.load_size or self.config.backbone.input_size(self.config.views)
        self.reader = backbone.reader(self.config.backbone.channels, size)
        self.objective: Objective = build_objective(self.config.objective, backbone, self.config.views)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=self.config.optimizer.lr)
        self.pool = ThreadPoolExecutor(self.config.decode_threads)
        self.order = self._order()
        self.ahead = self.pool.submit(self._decode, list(itertools.islice(self.order, self.config.global_batch)))

    def _order(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self.samples)).tolist()

    def _decode(self, ids: list[int]) -> Any:
        return self.reader.collate([self.reader.read(self.samples[i]) for i in ids]), torch.tensor(ids)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs, ids = self.ahead.result()
            following = list(itertools.islice(self.order, self.config.global_batch))
            self.ahead = self.pool.submit(self._decode, following)
            random = KeyedRandom.of(0, torch.zeros_like(ids), ids)
            with torch.no_grad():
                views = self.objective.make_views(as_input(inputs), random.fold("views"))
            batch = Batch(views, random.fold("objective"), ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self.objective(batch)["loss"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.objective.after_step(0.5)


def compare(objective: str, arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The row of one objective: samples/s of both loops, their ratio, and what ours waited for data."""
    config = configure(objective, arguments, data)
    with tempfile.TemporaryDirectory() as run:
        assert config.pretrain is not None
        fit_backbone(Path(run), config.pretrain, open_shards(config.datasets["train"]))
        ours = Ours(Path(run), config, TOOLS)
        ours.start()
        bare = Bare(config, Path(run) / FITTED)
        seconds = interleave(
            {"bare": lambda: bare.run(arguments.steps), "ours": lambda: ours.run(arguments.steps)}, arguments.repeats
        )
        ours.loader.close()
    samples = arguments.steps * arguments.batch
    row = {
        "samples_per_second": {name: samples / value for name, value in seconds.items()},
        "ratio": seconds["bare"] / seconds["ours"],
        "data_wait_share": ours.loader.wait_seconds / (seconds["ours"] * (arguments.repeats + 1)),
    }
    print(f"{objective:<20}{row['ratio']:>7.3f}", file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=sorted(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=8, help="steps a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        rows = {objective: compare(objective, arguments, data) for objective in arguments.objectives}
    write_result(
        "train-step",
        {
            "what": "samples/s of a training step, ours and a bare loop with the same model, views and decode",
            "settings": vars(arguments),
            "required": 0.90,
            "lowest": min(row["ratio"] for row in rows.values()),
            "objectives": rows,
        },
    )


if __name__ == "__main__":
    main()
