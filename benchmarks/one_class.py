"""One-class anomaly detection: trained on one class's training images, scored on all test images; mean over classes.

The recipes are configs/one_class/<dataset>/*.yaml, frozen on digits; their epochs are fixed beforehand. A label says
which images are trained on, and measures; nothing else. Digits have no test set: every second record is one. Each run
is one line of --runs, so an interrupted benchmark goes on where it stopped.

    python benchmarks/one_class.py [--datasets digits] [--recipes transform_likelihood] [--classes 0 1] [--seeds 0]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_result
from quality_images import recipe_hash

from sslscale.config import PackConfig, load_config
from sslscale.shards.dataset import ShardSet, open_shards, write_filtered
from sslscale.shards.decode import label_of
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.shards.write import run_pack

CONFIGS = Path(__file__).parents[1] / "configs" / "one_class"
CLASSES = 10


def labels(shards: ShardSet) -> list[np.ndarray]:
    """int64 (samples,) of each shard."""
    found = []
    for shard, count in enumerate(shards.counts.tolist()):
        samples = [item for item in read_spans(shards, [Span(shard, 0, count)]) if isinstance(item, Sample)]
        found.append(np.array([label_of(sample.data) for sample in samples]))
    return found


def only(shards: ShardSet, kept: list[np.ndarray], path: Path) -> str:
    """A list of the shards' records where `kept` (bool, one array a shard) is true."""
    parts = zip(shards.shards, kept, strict=True)
    write_filtered(path, [info.without(np.flatnonzero(~mask).tolist()) for info, mask in parts])
    return str(path)


def one_class_lists(pack: PackConfig, folder: Path, normal: int) -> dict[str, str]:
    """The training images of class `normal`, and all test images, as lists of shards."""
    train = open_shards(f"{pack.output}/train")
    own = labels(train)
    held_out = Path(pack.output, "test")
    if held_out.is_dir():
        test, first = str(held_out), [np.ones(len(part), dtype=bool) for part in own]
    else:
        first = [np.arange(len(part)) % 2 == 0 for part in own]
        test = only(train, [~mask for mask in first], folder / "test.json")
    chosen = [mask & (part == normal) for mask, part in zip(first, own, strict=True)]
    return {"train": only(train, chosen, folder / "train.json"), "test": test}


def measure(config: Path, seed: int, normal: int, data: Path, more: list[str]) -> dict[str, Any]:
    """AUROC of one class, the seconds that its training took, and what it measured without labels.

    `more` are further overrides.
    """
    settings = load_config(str(config), [f"pack.output={data}"])
    assert settings.pack is not None
    run_pack(settings.pack)
    with tempfile.TemporaryDirectory() as temporary:
        lists = one_class_lists(settings.pack, Path(temporary), normal)
        datasets = [f"datasets.{name}={location}" for name, location in lists.items()]
        overrides = [f"seed={seed}", "pack=null", *datasets, f"anomaly.normal_labels=[{normal}]", *more]
        command = [
            sys.executable,
            "-m",
            "sslscale.cli",
            "run",
            "-c",
            str(config),
            "--run",
            f"{temporary}/run",
            "--json",
        ]
        done = subprocess.run([*command, *overrides], stdout=subprocess.PIPE, text=True, check=True)
        results = json.loads(done.stdout.strip().splitlines()[-1])
    trained = results["pretrain"]
    return {"auroc": results["anomaly"]["measures"]["auroc"], "seconds": trained["seconds"], **trained["measures"]}


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a dataset and recipe: the mean over classes and seeds, and each class's own."""
    rows = []
    for dataset, recipe in sorted({(line["dataset"], line["recipe"]) for line in lines}):
        own = [line for line in lines if (line["dataset"], line["recipe"]) == (dataset, recipe)]
        by_class = {
            normal: statistics.mean(line["auroc"] for line in own if line["class"] == normal)
            for normal in sorted({line["class"] for line in own})
        }
        rows.append(
            {
                "dataset": dataset,
                "recipe": recipe,
                "seeds": sorted({line["seed"] for line in own}),
                "mean_auroc": statistics.mean(by_class.values()),
                "auroc": by_class,
                "seconds": statistics.mean(line["seconds"] for line in own),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist"])
    parser.add_argument("--recipes", nargs="+", default=["transform_likelihood", "deep_svdd"])
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(CLASSES)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=RESULTS / "one-class-runs.jsonl")
    parser.add_argument("--data", type=Path, default=Path("data") / "one_class", help="where the shards are kept")
    parser.add_argument("--trial", action="store_true", help="one epoch a run, and no result: whether all of it runs")
    arguments = parser.parse_args()
    more = ["pretrain.epochs=1"] if arguments.trial else []
    if arguments.trial:
        arguments.runs = Path(os.devnull)
    known = [json.loads(line) for line in arguments.runs.read_text().splitlines()] if arguments.runs.is_file() else []
    configs = {(path.parent.name, path.stem): path for path in sorted(CONFIGS.glob("*/*.yaml"))}
    hashes = {key: recipe_hash(path) for key, path in configs.items()}
    lines = [line for line in known if line["config"] == hashes.get((line["dataset"], line["recipe"]))]
    for (dataset, recipe), config in configs.items():
        if dataset not in arguments.datasets or recipe not in arguments.recipes:
            continue
        for seed in arguments.seeds:
            for normal in arguments.classes:
                key = {"dataset": dataset, "recipe": recipe, "seed": seed, "class": normal}
                if any(key.items() <= line.items() for line in lines):
                    continue
                row = measure(config, seed, normal, arguments.data.absolute() / dataset, more)
                lines.append({**key, "config": hashes[dataset, recipe], **row})
                print(json.dumps(lines[-1]), file=sys.stderr)
                arguments.runs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table(lines)
    if not arguments.trial:
        write_result(
            "one-class", {"what": "AUROC of one class against the others, by the objective's score", "table": rows}
        )
    for row in rows:
        print(f"{row['dataset']:<14}{row['recipe']:<22}{row['mean_auroc']:.4f}  {row['seconds']:.0f} s a class")


if __name__ == "__main__":
    main()
