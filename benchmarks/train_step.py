"""Every objective's training step against a bare PyTorch loop with the same model, views and decode, side by side.

Ours: shard plan, tar reading, decoding, keyed views, DeepSpeed engine (ZeRO 1), schedule, metrics. Bare: a list of the
same bytes in memory, the same decoder, the same views, the same loss, torch's AdamW; no tar, no engine, no resume.
Both run in this process on the same threads and take turns of a few steps; a ratio is the median of the turns' ratios,
since the speed of a shared machine wanders. What an objective prepares before its first step (neighbours, centroids,
assignments) is computed once and given to both, and partners of samples are read by both; preparing itself is in no
turn. The models and losses are those of the recipes: configs/images, regimes and one_class/fashion_mnist/ over 8,192
images of Fashion-MNIST (colorization, which needs colour, has configs/cifar10_colorization.yaml), configs/text/ over
8,192 glosses of WordNet, configs/video/ over 1,024 clips.
An objective that has a recipe only as a term of `joint` is measured as that term alone.

All objectives take one to one and a half hours of two cores. Each is one line of --runs, written as it is found: a
table that was interrupted goes on where it stopped, and a line counts as long as its config, settings and machine are
the same. Every row is printed, and what is missing.

    python benchmarks/train_step.py [--objectives simclr dino] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import RESULTS, hardware, medians, ratios, take_turns, write_result
from sittings import CODE, RunFailed, Runs, commits, exit_on_sigterm, show_missing
from torch import Tensor

from sslscale.config import PretrainConfig, RunConfig, load_config
from sslscale.corpus import TOOLS
from sslscale.models.export import build_backbone
from sslscale.objectives import OBJECTIVES, build_objective
from sslscale.objectives.base import Objective
from sslscale.pretrain.engine import agreed_precision
from sslscale.pretrain.loop import FITTED, Trainer
from sslscale.pretrain.stage import fit_backbone
from sslscale.rundir import hash_json
from sslscale.shards.dataset import open_shards
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.shards.write import run_pack
from sslscale.views.base import Batch, as_input
from sslscale.views.keyed import KeyedRandom

CONFIGS = Path(__file__).parents[1] / "configs"
REQUIRED = 0.90


class Recipe(NamedTuple):
    """A config, the source that it is measured on, the term of its `joint` that is measured (None: all of it), how many
    steps a turn has, and how many turns there are.
    """

    path: str
    source: str = "fashion-mnist"
    term: int | None = None
    steps: int = 4
    repeats: int = 11


LONG = {"steps": 2}  # of steps that take seconds
SHORT = {"steps": 8, "repeats": 21}  # of steps that take a quarter of one
RECIPES = {
    "context_prediction": Recipe("images/fashion_mnist/context_prediction.yaml", **SHORT),
    "colorization": Recipe("cifar10_colorization.yaml"),
    "joint": Recipe("regimes/fashion_mnist/joint_scan.yaml"),
    **{name: Recipe(f"regimes/fashion_mnist/joint_{name}.yaml", term=0) for name in ("idec", "scan", "temi")},
    **{name: Recipe(f"regimes/fashion_mnist/{name}.yaml") for name in ("experts", "iic", "sela")},
    **{name: Recipe(f"one_class/fashion_mnist/{name}.yaml") for name in ("csi", "deep_svdd", "transform_likelihood")},
    **{name: Recipe(f"text/{name}.yaml", "wordnet", **LONG) for name in ("causal_lm", "masked_lm", "simcse")},
    **{name: Recipe(f"video/{name}.yaml", "moving-digits", **LONG) for name in ("frame_order", "video_mae")},
}
LIMITS = {"moving-digits": 1024}


def recipe_of(objective: str) -> Recipe:
    return RECIPES.get(objective, Recipe(f"images/fashion_mnist/{objective}.yaml"))


def configure(objective: str, arguments: argparse.Namespace, data: Path) -> RunConfig:
    """The objective's recipe on one rank, over samples of its source in DATA/<source>."""
    recipe = recipe_of(objective)
    data, limit = data / recipe.source, LIMITS.get(recipe.source, 8192)
    config = load_config(
        str(CONFIGS / recipe.path),
        [
            *(f"pack.source={recipe.source}", f"pack.output={data}", f"pack.limit={limit}"),
            *(f"datasets.train={data}/train", "pretrain.held_out=null"),
            *("pretrain.num_workers=1", f"pretrain.threads={arguments.threads}", "pretrain.zero_stage=1"),
            *("pretrain.evaluate_samples=64", "pretrain.epochs=null", "pretrain.steps=1000000"),
            *("pretrain.checkpoint_every=1000000", f"pretrain.global_batch={arguments.batch}"),
            f"pretrain.precision={arguments.precision}",
        ],
    )
    assert config.pretrain is not None
    if recipe.term is not None:
        config.pretrain.objective = config.pretrain.objective["terms"][recipe.term]["objective"]
    return config


def row_hash(config: RunConfig, machine: dict[str, Any], recipe: Recipe) -> str:
    """Of all that a row depends on; where its shards lie is not among that."""
    assert config.pretrain is not None and config.pack is not None
    turns = [recipe.steps, recipe.repeats]
    return hash_json([CODE, config.pretrain.identity(), config.pack.identity(), turns, machine["name"], machine["cpu"]])


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
    """The shortest honest loop: what someone would write for one machine.

    `prepared` is an objective of the same config, whose weights and slow state this one begins with.
    """

    def __init__(self, config: RunConfig, files: Path, prepared: Objective) -> None:
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
        with torch.no_grad():
            for own, theirs in zip(self.objective.parameters(), prepared.parameters(), strict=True):
                own.copy_(theirs)
        self.objective.load_slow_state(prepared.slow_state())
        trained = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=self.config.optimizer.lr)
        self.pool = ThreadPoolExecutor(self.config.decode_threads)
        self.order = self._order()
        self.ahead = self.pool.submit(self._decode, list(itertools.islice(self.order, self.config.global_batch)))

    def _order(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self.samples)).tolist()

    def _decode(self, ids: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, ids, and the inputs of the samples that the objective names beside them, if it does."""
        places = torch.tensor(ids)
        partners = self.objective.partners(places, self._random(places).fold("partners"))
        beside = None if partners is None else self._read(partners.tolist())
        return self._read(ids), places, beside

    def _read(self, ids: list[int]) -> Tensor:
        return self.reader.collate([self.reader.read(self.samples[i]) for i in ids])

    def _random(self, ids: Tensor) -> KeyedRandom:
        return KeyedRandom.of(0, torch.zeros_like(ids), ids)

    @torch.no_grad()
    def _batch(self, inputs: Tensor, ids: Tensor, random: KeyedRandom, partner: Batch | None = None) -> Batch:
        views = self.objective.make_views(as_input(inputs), random.fold("views"))
        return Batch(views, random.fold("objective"), ids, partner)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs, ids, beside = self.ahead.result()
            following = list(itertools.islice(self.order, self.config.global_batch))
            self.ahead = self.pool.submit(self._decode, following)
            random = self._random(ids)
            partner = None if beside is None else self._batch(beside, ids, random.fold("partner"))
            batch = self._batch(inputs, ids, random, partner)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self.objective(batch)["loss"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.objective.after_step(0.5)

    def close(self) -> None:
        self.pool.shutdown()


def compare(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    """A row: samples/s of both loops, their ratio, and what ours waited for data. RunFailed where one of them fails."""
    try:
        return _compare(config, recipe)
    except Exception as error:  # of any kind: the table goes on with the other objectives
        traceback.print_exc()
        raise RunFailed(f"{type(error).__name__}: {error}") from error


def _compare(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    assert config.pretrain is not None and config.pack is not None
    if not Path(config.datasets["train"]).is_dir():
        run_pack(config.pack)
    with tempfile.TemporaryDirectory() as run:
        fit_backbone(Path(run), config.pretrain, open_shards(config.datasets["train"]))
        ours = Ours(Path(run), config, TOOLS)
        bare = Bare(config, Path(run) / FITTED, ours.objective)
        ours.start()
        try:
            turns = take_turns(
                {"bare": lambda: bare.run(recipe.steps), "ours": lambda: ours.run(recipe.steps)}, recipe.repeats
            )
        finally:
            ours.loader.close()
            bare.close()
    samples = recipe.steps * config.pretrain.global_batch
    found = ratios(turns["bare"], turns["ours"])
    return {
        "samples_per_second": {name: samples / value for name, value in medians(turns).items()},
        "ratio": statistics.median(found),
        "ratios": [round(ratio, 3) for ratio in found],
        "data_wait_share": ours.loader.wait_seconds / (statistics.mean(turns["ours"]) * (recipe.repeats + 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=sorted(OBJECTIVES), choices=sorted(OBJECTIVES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--runs", type=Path, default=RESULTS / "train-step-runs.jsonl")
    arguments = parser.parse_args()
    exit_on_sigterm()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    arguments.precision = agreed_precision(arguments.precision, torch.device("cpu"))
    runs, machine, hashes = Runs(arguments.runs), hardware(), {}
    with tempfile.TemporaryDirectory() as temporary:
        for objective in sorted(OBJECTIVES):
            config = configure(objective, arguments, Path(temporary) / "data")
            hashes[objective] = row_hash(config, machine, recipe_of(objective))
            if objective in arguments.objectives:
                measure = partial(compare, config, recipe_of(objective))
                runs.attempt({"objective": objective}, hashes[objective], measure)
    whole = [({"objective": objective}, digest) for objective, digest in hashes.items()]
    lines = [line for key, digest in whole if (line := runs.find(key, digest)) is not None and "failed" not in line]
    missing = runs.missing(whole)
    kept = ("samples_per_second", "ratio", "ratios", "data_wait_share")
    rows = {line["objective"]: {name: line[name] for name in kept} for line in lines}
    settings = {name: getattr(arguments, name) for name in ("threads", "batch", "precision")}
    write_result(
        "train-step",
        {
            "what": "samples/s of a training step, ours and a bare loop with the same model, views and decode",
            "settings": settings,
            "required": REQUIRED,
            "lowest": min((row["ratio"] for row in rows.values()), default=None),
            "commits": commits(lines),
            "missing": missing,
            "objectives": rows,
        },
    )
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
        spread = f"{row['ratios'][0]:>9.2f} to {row['ratios'][-1]:.2f}"
        print(f"{name:<22}{row['ratio']:>7.3f}{spread}{'' if row['ratio'] >= REQUIRED else f'  BELOW {REQUIRED}'}")
    show_missing(missing)


if __name__ == "__main__":
    main()
