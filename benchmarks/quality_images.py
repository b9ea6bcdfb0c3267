"""Every image objective on digits and Fashion-MNIST at an equal budget: clusters, kNN and RankMe of the last epoch.

The budget is one minute (digits) and ten minutes (Fashion-MNIST) of training on two cores. The recipes are the configs
under configs/images/<dataset>/, one an objective; their epochs are what fits into the budget, and they were frozen
before a label of the data that is measured was read. Labels are read only by the measures. Each run is one line of
--runs, so an interrupted benchmark goes on where it stopped, and a recipe that changed is run again. Every row is
printed, raw pixels' too.

    python benchmarks/quality_images.py [--datasets digits] [--recipes simclr dino] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import RESULTS, write_result

from sslscale.config import load_config
from sslscale.features import open_features
from sslscale.index.exact import SetReference, exact_knn
from sslscale.rundir import RunDir, hash_json

CONFIGS = Path(__file__).parents[1] / "configs" / "images"
NEIGHBOURS = 20
COLUMNS = ("acc", "nmi", "ari", "knn", "rankme", "seconds")


def knn_accuracy(run: Path) -> float:
    """A vote of the 20 nearest by cosine: of `test` among `train`, or of every row of `train` among all others."""
    reference = open_features(RunDir(run), ["train"])
    held_out = (run / "embed" / "test" / "features.json").is_file()
    queries = open_features(RunDir(run), ["test"]) if held_out else reference
    ids = queries.row_ids(np.arange(queries.num_rows))
    own = np.full(len(ids), -1) if held_out else ids
    found = exact_knn(queries.take(ids), own, SetReference(reference), NEIGHBOURS, "cosine")[1]
    labels, truth = reference.labels(), queries.labels()
    assert labels is not None and truth is not None
    starts = np.cumsum([0, *(part.rows for part in reference.parts)])
    votes = labels[starts[found >> 32] + (found & 0xFFFFFFFF)]
    return float(np.mean([np.bincount(vote).argmax() == label for vote, label in zip(votes, truth, strict=True)]))


def recipe_hash(path: Path) -> str:
    """Of what the recipe and its base say."""
    recipe = yaml.safe_load(path.read_text())
    return hash_json([recipe, yaml.safe_load((path.parent / recipe["base"]).read_text())])


def measure(config: Path, seed: int, data: str) -> dict[str, dict[str, Any]]:
    """The row of this recipe with this seed, and the one of raw pixels by the same code."""
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-m", "sslscale.cli", "run", "-c", str(config), "--run", run, "--json"]
        datasets = [f"datasets.{name}={data}/{name}" for name in load_config(str(config)).datasets]
        overrides = [f"seed={seed}", f"pack.output={data}", *datasets, "baselines=[pixels]"]
        done = subprocess.run([*command, *overrides], stdout=subprocess.PIPE, text=True, check=True)
        results = json.loads(done.stdout.strip().splitlines()[-1])
        trained = results["pretrain"]
        return {
            config.stem: {
                **_clusters(results["cluster"]),
                "knn": knn_accuracy(Path(run)),
                "rankme": trained["measures"]["rankme"],
                "seconds": trained["seconds"],
                "epochs": trained["epochs"],
            },
            "pixels": {
                **_clusters(results["baselines"]["pixels"]),
                "knn": knn_accuracy(Path(run) / "baselines" / "pixels"),
            },
        }


def _clusters(result: dict[str, Any]) -> dict[str, float]:
    return {name: result["measures"][name] for name in ("acc", "nmi", "ari")}


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a dataset and recipe: mean and standard deviation over its seeds, and whether kNN is above pixels'."""
    rows = []
    for dataset, recipe in sorted({(line["dataset"], line["recipe"]) for line in lines}):
        own = [line for line in lines if (line["dataset"], line["recipe"]) == (dataset, recipe)]
        row: dict[str, Any] = {"dataset": dataset, "recipe": recipe, "seeds": sorted(line["seed"] for line in own)}
        for column in COLUMNS:
            values = [line[column] for line in own if line.get(column) is not None]
            row[column] = statistics.mean(values) if values else None
            row[f"{column}_stdev"] = statistics.stdev(values) if len(values) > 1 else None
        pixels = [line["knn"] for line in lines if (line["dataset"], line["recipe"]) == (dataset, "pixels")]
        row["knn_above_pixels"] = None if recipe == "pixels" else row["knn"] > statistics.mean(pixels)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'dataset':<14}{'recipe':<20}{'seeds':>5}" + "".join(f"{column:>10}" for column in COLUMNS))
    for row in sorted(rows, key=lambda row: (row["dataset"], -row["acc"])):
        values = "".join(f"{'' if row[column] is None else format(row[column], '.3f'):>10}" for column in COLUMNS)
        below = "" if row["knn_above_pixels"] in (True, None) else "  kNN not above pixels"
        print(f"{row['dataset']:<14}{row['recipe']:<20}{len(row['seeds']):>5}{values}{below}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["digits", "fashion_mnist"])
    parser.add_argument("--recipes", nargs="+", help="default: all of the dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=RESULTS / "quality-images-runs.jsonl")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.runs.read_text().splitlines()] if arguments.runs.is_file() else []
    configs = {(path.parent.name, path.stem): (path, recipe_hash(path)) for path in sorted(CONFIGS.glob("*/*.yaml"))}
    hashes = {key: digest for key, (_, digest) in configs.items()}
    lines = [line for line in lines if line["config"] == hashes.get((line["dataset"], line["of"]))]
    with tempfile.TemporaryDirectory() as temporary:
        for seed in arguments.seeds:
            for (dataset, recipe), (config, digest) in configs.items():
                wanted = dataset in arguments.datasets and recipe in (arguments.recipes or [recipe])
                known = {(line["dataset"], line["recipe"], line["seed"]) for line in lines}
                if not wanted or (dataset, recipe, seed) in known:
                    continue
                for name, row in measure(config, seed, f"{temporary}/{dataset}").items():
                    if (dataset, name, seed) not in known:
                        line = {"dataset": dataset, "recipe": name, "seed": seed, "of": recipe, "config": digest, **row}
                        print(json.dumps(line), file=sys.stderr)
                        lines.append(line)
                arguments.runs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table(lines)
    write_result("quality-images", {"what": "frozen features of every image objective, k-means with 10", "table": rows})
    show(rows)


if __name__ == "__main__":
    main()
