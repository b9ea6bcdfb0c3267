"""Every image objective on digits and Fashion-MNIST at an equal budget: clusters, kNN and RankMe of the last epoch.

The budget is one minute (digits) and ten minutes (Fashion-MNIST) of training on two cores; the table has each row's
share of it. The recipes are the configs under configs/images/<dataset>/, one an objective; their epochs are what fits
into the budget, and they were frozen before a label of the data that is measured was read. Labels are read only by the
measures. K-means clusters all images of a dataset together, the test images among them, and spectral clustering of the
kNN graph does beside it where N allows; kNN is of the test images among the training images where there are such. Each
run is one line of --runs, so an interrupted benchmark goes on where it stopped, and a recipe that changed is run again.
Every row is printed, raw pixels' too, and what is missing.

    python benchmarks/quality_images.py [--datasets digits] [--recipes simclr dino] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_result
from sittings import (
    Runs,
    against_labels,
    commits,
    exit_on_sigterm,
    over_budget,
    recipe_hash,
    run_verb,
    show_missing,
    without_training,
)

from sslscale.cluster.others import MAX_ROWS
from sslscale.config import load_config
from sslscale.features import open_features
from sslscale.index.exact import SetReference, exact_knn
from sslscale.rundir import RunDir

CONFIGS = Path(__file__).parents[1] / "configs" / "images"
BUDGETS = {"digits": 60.0, "fashion_mnist": 600.0}  # seconds of training on two cores
PIXELS = "pixels"
SEEDS = [0, 1, 2]
NEIGHBOURS = 20
COLUMNS = ("acc", "nmi", "ari", "spectral_acc", "spectral_nmi", "spectral_ari", "knn", "rankme", "seconds")


def recipes(dataset: str) -> dict[str, Path]:
    """Name -> config; that of pixels is the base of all."""
    own = {path.stem: path for path in sorted((CONFIGS / dataset).glob("*.yaml"))}
    return {PIXELS: CONFIGS / f"{dataset}.yaml", **own}


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
    votes = labels[reference.positions(found)]
    return float(np.mean([np.bincount(vote).argmax() == label for vote, label in zip(votes, truth, strict=True)]))


def measure(recipe: str, config: Path, seed: int, data: str) -> dict[str, Any]:
    """One run's row."""
    datasets = [f"datasets.{name}={data}/{name}" for name in load_config(str(config)).datasets]
    features = without_training(config, PIXELS) if recipe == PIXELS else []
    with tempfile.TemporaryDirectory() as run:
        overrides = [f"seed={seed}", f"pack.output={data}", *datasets, *features]
        results = run_verb("run", config, Path(run), overrides)
        row = {**against_labels(results["cluster"]["measures"]), "knn": knn_accuracy(Path(run))}
        if results["cluster"]["num_samples"] <= MAX_ROWS["spectral"]:
            again = run_verb("cluster", config, Path(run), [*overrides, "cluster.method=spectral", "--overwrite"])
            row |= against_labels(again["measures"], "spectral_")
    if recipe == PIXELS:
        return row
    trained = results["pretrain"]
    return row | {
        "rankme": trained["measures"].get("rankme"),
        "seconds": trained["seconds"],
        "epochs": trained["epochs"],
    }


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a dataset and recipe: mean and standard deviation over its seeds, `budget_share`, the mean seconds by the
    budget, and whether kNN is above pixels' (None where that is not known).
    """
    rows = []
    for dataset, recipe in sorted({(line["dataset"], line["recipe"]) for line in lines}):
        own = [line for line in lines if (line["dataset"], line["recipe"]) == (dataset, recipe)]
        row: dict[str, Any] = {"dataset": dataset, "recipe": recipe, "seeds": sorted(line["seed"] for line in own)}
        for column in COLUMNS:
            values = [line[column] for line in own if line.get(column) is not None]
            row[column] = statistics.mean(values) if values else None
            row[f"{column}_stdev"] = statistics.stdev(values) if len(values) > 1 else None
        row["budget_share"] = None if row["seconds"] is None else row["seconds"] / BUDGETS[dataset]
        pixels = [line["knn"] for line in lines if (line["dataset"], line["recipe"]) == (dataset, PIXELS)]
        compared = recipe != PIXELS and bool(pixels) and row["knn"] is not None
        row["knn_above_pixels"] = row["knn"] > statistics.mean(pixels) if compared else None
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = (*COLUMNS, "budget_share")
    print(f"{'dataset':<14}{'recipe':<20}{'seeds':>5}" + "".join(f"{column:>13}" for column in columns))
    for row in sorted(rows, key=lambda row: (row["dataset"], -(row["acc"] or 0.0))):
        values = "".join(f"{'' if row[column] is None else format(row[column], '.3f'):>13}" for column in columns)
        below = "  kNN not above pixels" if row["knn_above_pixels"] is False else ""
        print(
            f"{row['dataset']:<14}{row['recipe']:<20}{len(row['seeds']):>5}{values}"
            + below
            + over_budget(row["budget_share"])
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--recipes", nargs="+", help="beside pixels; default: all of the dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=RESULTS / "quality-images-runs.jsonl")
    arguments = parser.parse_args()
    exit_on_sigterm()
    runs = Runs(arguments.runs)
    configs = {(dataset, recipe): path for dataset in BUDGETS for recipe, path in recipes(dataset).items()}
    hashes = {(dataset, recipe): recipe_hash(path) for (dataset, recipe), path in configs.items()}
    whole = [
        ({"dataset": dataset, "recipe": recipe, "seed": seed}, digest)
        for seed in dict.fromkeys([*SEEDS, *arguments.seeds])
        for (dataset, recipe), digest in hashes.items()
        if dataset in arguments.datasets
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for key, digest in whole:
            dataset, recipe, seed = key["dataset"], key["recipe"], key["seed"]
            if seed in arguments.seeds and recipe in (PIXELS, *(arguments.recipes or [recipe])):
                config, data = configs[dataset, recipe], f"{temporary}/{dataset}"
                runs.attempt(key, digest, partial(measure, recipe, config, seed, data))
    lines = runs.measured(hashes)
    rows, missing = table(lines), runs.missing(whole)
    write_result(
        "quality-images",
        {
            "what": "frozen features of every image objective, k-means with 10",
            "budget_seconds": BUDGETS,
            "commits": commits(lines),
            "missing": missing,
            "table": rows,
        },
    )
    show(rows)
    show_missing(missing)


if __name__ == "__main__":
    main()
