"""One-class anomaly detection: trained on one class's training images, scored on all test images; mean over classes.

The recipes are configs/one_class/<dataset>/*.yaml, frozen on digits; their epochs are fixed beforehand. A label says
which images are trained on, and measures; nothing else. Digits have no test set: every second record is one. Beside
them, on the same images: the mean distance to the 5 nearest training images by pixels, and a Gaussian kernel density of
HOG, whose bandwidth is that under which the training images are the likeliest when each is left out in turn.
The budget is what training and scoring take together, five minutes of two cores a class (one for digits).

Each run is one line of --runs, so an interrupted benchmark goes on where it stopped. Every row is printed, over as many
classes as it has, and what is missing.

    python benchmarks/one_class.py [--datasets digits] [--recipes transform_likelihood] [--classes 0 1] [--seeds 0]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, list_records, write_result
from scipy.special import logsumexp
from sittings import (
    Runs,
    commits,
    exit_on_sigterm,
    over_budget,
    recipe_hash,
    run_verb,
    show_missing,
    without_training,
)
from sklearn.metrics import euclidean_distances

from sslscale.anomaly.measures import anomaly_measures
from sslscale.config import PackConfig, load_config
from sslscale.features import open_features
from sslscale.rundir import RunDir
from sslscale.shards.dataset import ShardSet, open_shards
from sslscale.shards.decode import label_of
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.shards.write import run_pack

CONFIGS = Path(__file__).parents[1] / "configs"
BUDGETS = {"digits": 60.0, "fashion_mnist": 300.0}  # seconds a class
CLASSES, SEEDS = 10, [0]
NEAREST, DENSITY = "pixels_5nn", "hog_kde"
NEIGHBOURS, BANDWIDTHS = 5, 25
DEFAULT = ("transform_likelihood", "deep_svdd", "csi", NEAREST, DENSITY)
FITTED = ("embed.datasets=[train,test]", "cluster=null")


def recipes(dataset: str) -> dict[str, Path]:
    """Name -> config; that of the two without training is the base of all."""
    own = {path.stem: path for path in sorted((CONFIGS / "one_class" / dataset).glob("*.yaml"))}
    return {**own, **dict.fromkeys((NEAREST, DENSITY), CONFIGS / "images" / f"{dataset}.yaml")}


def labels(shards: ShardSet) -> list[np.ndarray]:
    """int64 (samples,) of each shard."""
    found = []
    for shard, count in enumerate(shards.counts.tolist()):
        samples = [item for item in read_spans(shards, [Span(shard, 0, count)]) if isinstance(item, Sample)]
        found.append(np.array([label_of(sample.data) for sample in samples]))
    return found


def one_class_lists(pack: PackConfig, folder: Path, normal: int) -> dict[str, str]:
    """The training images of class `normal`, and all test images, as lists of shards."""
    train, held_out = f"{pack.output}/train", Path(pack.output, "test")
    own = labels(open_shards(train))
    if held_out.is_dir():
        test, first = str(held_out), [np.ones(len(part), dtype=bool) for part in own]
    else:
        first = [np.arange(len(part)) % 2 == 0 for part in own]
        test = list_records(train, [~mask for mask in first], folder / "test.json")
    chosen = [mask & (part == normal) for mask, part in zip(first, own, strict=True)]
    return {"train": list_records(train, chosen, folder / "train.json"), "test": test}


def measure(recipe: str, config: Path, seed: int, normal: int, data: Path, more: list[str]) -> dict[str, Any]:
    """AUROC of one class, the seconds that training and scoring took, and what was measured without labels.

    `more` are further overrides of what is trained.
    """
    settings = load_config(str(config), [f"pack.output={data}"])
    assert settings.pack is not None
    run_pack(settings.pack)
    with tempfile.TemporaryDirectory() as temporary:
        lists = one_class_lists(settings.pack, Path(temporary), normal)
        datasets = [f"datasets.{name}={location}" for name, location in lists.items()]
        run, overrides = Path(temporary) / "run", [f"seed={seed}", "pack=null", *datasets]
        if recipe == NEAREST:
            scored = f"{{method: exact, datasets: [test], reference: [train], k: {NEIGHBOURS}, metric: l2}}"
            overrides += [*without_training(config, "pixels"), *FITTED, f"anomaly={scored}"]
            results = run_verb("run", config, run, [*overrides, f"anomaly.normal_labels=[{normal}]"])
            return {"auroc": results["anomaly"]["measures"]["auroc"]}
        if recipe == DENSITY:
            run_verb("run", config, run, [*overrides, *without_training(config, "hog"), *FITTED])
            return {"auroc": density_auroc(run, normal)}
        results = run_verb("run", config, run, [*overrides, f"anomaly.normal_labels=[{normal}]", *more])
    trained, embedded = results["pretrain"], results["embed"]["test"]
    return {
        "auroc": results["anomaly"]["measures"]["auroc"],
        "training_seconds": trained["seconds"],
        "scoring_seconds": embedded["samples_in"] / embedded["samples_per_second"],
        **trained["measures"],
    }


def density_auroc(run: Path, normal: int) -> float:
    """AUROC of the density of the run's training rows at its test rows."""
    train, test = (open_features(RunDir(run), [name]) for name in ("train", "test"))
    x, y = (own.take(own.row_ids(np.arange(own.num_rows))).astype(np.float32) for own in (train, test))
    return anomaly_measures(-log_density(x, y), test.labels(), [normal])["auroc"]


def log_density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m,): log density, up to a constant, of rows y (m, D) under a Gaussian kernel on each row of x (n, D).

    The kernel's variance is the one, of some around the square distance to the nearest, that has the highest
    leave-one-out likelihood of x.
    """
    own = euclidean_distances(x, squared=True)
    np.fill_diagonal(own, np.inf)
    around = np.median(own.min(axis=1)) / x.shape[1]
    variances = around * np.geomspace(1 / 16, 16, BANDWIDTHS)

    def likelihood(variance: float) -> float:
        return float(logsumexp(-own / (2 * variance), axis=1).mean() - x.shape[1] / 2 * np.log(variance))

    best = max(variances, key=likelihood)
    return logsumexp(-euclidean_distances(y, x, squared=True) / (2 * best), axis=1)


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a dataset and recipe: the mean over its classes and seeds, and each class's own."""
    rows = []
    for dataset, recipe in sorted({(line["dataset"], line["recipe"]) for line in lines}):
        own = [line for line in lines if (line["dataset"], line["recipe"]) == (dataset, recipe)]
        by_class = {
            normal: statistics.mean(line["auroc"] for line in own if line["class"] == normal)
            for normal in sorted({line["class"] for line in own})
        }
        seconds = {
            name: statistics.mean(line[name] for line in own) if all(name in line for line in own) else None
            for name in ("training_seconds", "scoring_seconds")
        }
        taken = [value for value in seconds.values() if value is not None]
        rows.append(
            {
                "dataset": dataset,
                "recipe": recipe,
                "seeds": sorted({line["seed"] for line in own}),
                "classes": len(by_class),
                "mean_auroc": statistics.mean(by_class.values()),
                "auroc": by_class,
                **seconds,
                "budget_share": sum(taken) / BUDGETS[dataset] if taken else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("training_seconds", "scoring_seconds", "budget_share")
    header = "".join(f"{column:>18}" for column in columns)
    print(f"{'dataset':<14}{'recipe':<22}{'classes':>8}{'mean_auroc':>12}{header}")
    for row in rows:
        values = "".join(f"{'' if row[column] is None else format(row[column], '.2f'):>18}" for column in columns)
        print(
            f"{row['dataset']:<14}{row['recipe']:<22}{row['classes']:>5}/{CLASSES}{row['mean_auroc']:>12.4f}{values}"
            + over_budget(row["budget_share"])
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist"], choices=list(BUDGETS))
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULT))
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(CLASSES)))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=RESULTS / "one-class-runs.jsonl")
    parser.add_argument("--data", type=Path, default=Path("data") / "one_class", help="where the shards are kept")
    parser.add_argument("--trial", action="store_true", help="one epoch a run, and no result: whether all of it runs")
    arguments = parser.parse_args()
    exit_on_sigterm()
    more = ["pretrain.epochs=1"] if arguments.trial else []
    runs = Runs(None if arguments.trial else arguments.runs)
    configs = {(dataset, recipe): path for dataset in BUDGETS for recipe, path in recipes(dataset).items()}
    hashes = {(dataset, recipe): recipe_hash(path, recipe, more) for (dataset, recipe), path in configs.items()}
    asked = list(dict.fromkeys([*SEEDS, *arguments.seeds]))
    whole = [
        ({"dataset": dataset, "recipe": recipe, "seed": seed, "class": normal}, hashes[dataset, recipe])
        for dataset in arguments.datasets
        for recipe in dict.fromkeys([*DEFAULT, *arguments.recipes])
        for seed in (SEEDS if recipe in (NEAREST, DENSITY) else asked)  # these two draw nothing
        for normal in range(CLASSES)
    ]
    for key, digest in whole:
        seeds = SEEDS if key["recipe"] in (NEAREST, DENSITY) else arguments.seeds
        if key["recipe"] in arguments.recipes and key["class"] in arguments.classes and key["seed"] in seeds:
            config, data = configs[key["dataset"], key["recipe"]], arguments.data.absolute() / key["dataset"]
            made = partial(measure, key["recipe"], config, key["seed"], key["class"], data, more)
            runs.attempt(key, digest, made)
    lines = runs.measured(hashes)
    rows, missing = table(lines), runs.missing(whole)
    if not arguments.trial:
        what = "AUROC of one class against the others, by the objective's score"
        record = {"budget_seconds": BUDGETS, "commits": commits(lines), "missing": missing}
        write_result("one-class", {"what": what, **record, "table": rows})
    show(rows)
    show_missing(missing)


if __name__ == "__main__":
    main()
