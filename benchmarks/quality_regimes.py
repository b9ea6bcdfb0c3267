"""The three regimes side by side: A (SimCLR, then k-means), B (joint) and C (self-supervision as the objective).

Every B and C row starts from `start`, SimCLR at half of the budget (configs/images/<dataset>/simclr.yaml), and trains
for the other half; `alone` is SimCLR at the whole budget, followed by k-means, so each row is compared with it at an
equal total: `total_seconds` is a row's own plus its start's, `budget_share` that by the budget. The recipes are
configs/regimes/<dataset>/*.yaml, frozen before a label of the data that is measured was read; the last epoch counts.
Nothing is fitted on test images: k-means (pixels, hog, start, alone) is fitted on the training images, and test images
take the nearest centroid. Clusters of B and C are the objective's own, and no label chooses a head: the loss on
held-out images does. Digits have no test set: every second record is one, and epochs are doubled, so that steps stay
what they are. `experts_init` is where `experts` begins, after one step at a rate of nothing.

Declared beforehand: five seeds of what is trained for the comparison of B with A (`start`, `alone`, B) and of pixels
and hog, the first three of C; a table of the first three seeds of every row is printed too. The primary comparison is
`joint_scan` with `alone` by NMI on test; every difference has its 95% interval by Student's t, paired by seed, and,
since there are several rows, one that Bonferroni corrects for their number.

Each run is one line of --runs, so an interrupted benchmark goes on where it stopped. Every row is printed, and what is
missing.

    python benchmarks/quality_regimes.py [--datasets digits] [--recipes joint_scan iic] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, list_records, write_result
from regimes_table import ALONE, BUDGETS, PRIMARY, START, show, table
from sittings import (
    Runs,
    against_labels,
    commits,
    exit_on_sigterm,
    recipe_hash,
    run_verb,
    show_missing,
    without_training,
)

from sslscale.cluster.kernels import nearest_centroid
from sslscale.cluster.measures import label_measures
from sslscale.config import load_config
from sslscale.features import open_features, sample_positions
from sslscale.features.distance import prepare
from sslscale.rundir import RunDir, read_json
from sslscale.shards.dataset import open_shards
from sslscale.shards.write import run_pack

CONFIGS = Path(__file__).parents[1] / "configs"
DATASETS = ("digits", "fashion_mnist")
FEATURES = ("pixels", "hog")
INITIAL = {"experts": "experts_init"}
SEEDS, FIRST_SEEDS = [0, 1, 2, 3, 4], [0, 1, 2]
COMPARED_SAMPLES = 2000  # test samples whose clusters a line keeps, to compare seeds with each other
ONLY_TRAIN = "cluster.datasets=[train]"
# A run that is killed goes on from its last checkpoint. The evaluations beside checkpoints stop no run: only the last
# one of a row counts.
RESUMABLE = ("pretrain.checkpoint_every=200", "pretrain.collapse.evaluations=1000000")
ONE_STEP = ("pretrain.epochs=null", "pretrain.steps=1", "pretrain.optimizer.lr=1e-12")


@dataclass(frozen=True)
class Row:
    """How a row is made: a config, what the benchmark changes in it, and the hash of all that it depends on."""

    config: Path
    overrides: tuple[str, ...]
    digest: str
    trained: bool = True
    follows_start: bool = False
    joint: bool = False


def rows_of(dataset: str, more: Sequence[str] = ()) -> dict[str, Row]:
    """Name -> row, `start` first since the others need it. `more` are overrides of whatever is trained."""
    images, regimes = CONFIGS / "images", CONFIGS / "regimes" / dataset
    base, simclr = images / f"{dataset}.yaml", images / dataset / "simclr.yaml"

    def by_kmeans(config: Path, *overrides: str, trained: bool = True) -> Row:
        changes = (*_split(config), ONLY_TRAIN, *overrides)
        return Row(config, changes, recipe_hash(config, changes), trained)

    found = {START: by_kmeans(simclr, *more)}
    found |= {name: by_kmeans(base, *without_training(base, name), trained=False) for name in FEATURES}
    for path in sorted(regimes.glob("*.yaml")):
        if path.stem == ALONE:
            found[ALONE] = by_kmeans(path, *more)
            continue
        trained = load_config(str(path)).pretrain
        assert trained is not None
        joint = trained.objective["name"] == "joint"
        variants = {path.stem: tuple(more), **({INITIAL[path.stem]: ONE_STEP} if path.stem in INITIAL else {})}
        for name, overrides in variants.items():
            changes = (*_split(path), *overrides)
            digest = recipe_hash(path, changes, found[START].digest)
            found[name] = Row(path, changes, digest, follows_start=True, joint=joint)
    return found


def _split(config: Path) -> tuple[str, ...]:
    """What makes a test set of half of the images where the source has none."""
    settings = load_config(str(config))
    if "test" in settings.datasets:
        return ()
    assert settings.pretrain is not None and settings.pretrain.epochs is not None
    epochs = 2 * settings.pretrain.epochs
    return (f"pretrain.epochs={epochs}", "pretrain.held_out=test", "embed.datasets=[train,test]")


def located(config: Path, data: Path) -> list[str]:
    """Overrides that name the training and the test set, which are packed into `data` once."""
    pack = load_config(str(config), [f"pack.output={data}"]).pack
    assert pack is not None
    run_pack(pack)
    train, test = str(data / "train"), str(data / "test")
    if not (data / "test").is_dir():
        first = [np.arange(count) % 2 == 0 for count in open_shards(train).counts]
        halves = list_records(train, first, data / "halves" / "train.json")
        test = list_records(train, [~mask for mask in first], data / "halves" / "test.json")
        train = halves
    return ["pack=null", f"datasets.train={train}", f"datasets.test={test}"]


def seeds_of(row: Row, seeds: list[int]) -> list[int]:
    """Of these seeds, those of this row: of C the first ones alone."""
    return [seed for seed in seeds if row.joint or not row.follows_start or seed in FIRST_SEEDS]


def measure(row: Row, seed: int, data: Path, run: Path | None, start: Path | None) -> dict[str, Any]:
    """One run's row, made in `run` (None: a temporary folder) from the backbone of the run `start`."""
    if run is None:
        with tempfile.TemporaryDirectory() as temporary:
            return measure(row, seed, data, Path(temporary), start)
    overrides = [f"seed={seed}", *located(row.config, data), *row.overrides]
    if row.trained:
        overrides += RESUMABLE
    if start is not None:
        overrides.append(f"pretrain.init_from={start}")
    results = run_verb("run", row.config, run, overrides)
    clusters = results["cluster"]
    found = {
        **against_labels(clusters.get("datasets", {}).get("train", clusters)["measures"]),
        **test_row(run),
        "silhouette": clusters["measures"]["silhouette"],
    }
    if row.trained:
        trained = results["pretrain"]
        found |= {**trained["measures"], "seconds": trained["seconds"], "epochs": trained["epochs"]}
    if start is not None:  # a lost start is trained again, on whatever machine, and takes another time
        found["start_seconds"] = read_json(start / "pretrain" / "result.json")["seconds"]
    return found


def test_row(run: Path) -> dict[str, Any]:
    """ACC, NMI and ARI of the test images, in the clusters that the run gave them or else of the nearest centroid; and
    `clusters`, those of some of them in a fixed order, a character each.
    """
    features = open_features(RunDir(run), ["test"])
    truth, folder = features.labels(), run / "cluster" / "main"
    files = [folder / "assignments" / part.file for part in features.parts]
    if all(file.is_file() for file in files):
        assigned = np.concatenate([np.load(file) for file in files])
    else:
        rows = prepare(features.take(features.row_ids(np.arange(features.num_rows))), "l2")
        assigned = nearest_centroid(rows, np.load(folder / "centroids.npy"))
    kept = assigned[sample_positions(len(assigned), COMPARED_SAMPLES, seed=0)]
    return {
        **against_labels(label_measures(truth, assigned), "test_"),
        "clusters": "".join(np.base_repr(cluster, 36) for cluster in kept),
    }


def folder_of(work: Path, name: str, row: Row, seed: int) -> Path:
    """Where the run of a row is kept: another recipe has another folder."""
    return work / f"{name}-{seed}-{row.digest}"


def wanted_rows(rows: dict[str, Row], named: Sequence[str] | None) -> list[str]:
    """The rows named on the command line, each with its initialisation; all where none is."""
    named = [*named, *(INITIAL[name] for name in named if name in INITIAL)] if named else list(rows)
    return [name for name in rows if name in named]


def make_rows(
    dataset: str, rows: dict[str, Row], wanted: Sequence[str], seeds: list[int], work: Path, runs: Runs
) -> None:
    """Makes the wanted rows that are not done, and the start that they need: without it they wait."""
    for seed in seeds:
        keys = {name: {"dataset": dataset, "recipe": name, "seed": seed} for name in rows}
        mine = [name for name in wanted if seed in seeds_of(rows[name], seeds)]
        due = [name for name in mine if not runs.done(keys[name], rows[name].digest)]
        start = folder_of(work, START, rows[START], seed)
        backbone = start / "pretrain" / "backbone"
        lost = any(rows[name].follows_start for name in due) and not backbone.is_dir()
        for name in dict.fromkeys([*([START] if lost else []), *due]):
            row = rows[name]
            if row.follows_start and not backbone.is_dir():
                print(f"{name} of seed {seed} waits for its start", file=sys.stderr)
                continue
            run = folder_of(work, name, row, seed) if row.trained else None
            made = partial(measure, row, seed, work / "data", run, start if row.follows_start else None)
            runs.attempt(keys[name], row.digest, made, again=lost and name == START)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist"], choices=DATASETS)
    parser.add_argument("--recipes", nargs="+", help="default: all of the dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of C those up to 2")
    parser.add_argument("--runs", type=Path, default=RESULTS / "quality-regimes-runs.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs") / "quality_regimes", help="where the runs are kept")
    parser.add_argument("--trial", action="store_true", help="one epoch a run, and no result: whether all of it runs")
    arguments = parser.parse_args()
    exit_on_sigterm()
    runs = Runs(None if arguments.trial else arguments.runs)
    rows = {dataset: rows_of(dataset, ["pretrain.epochs=1"] if arguments.trial else []) for dataset in DATASETS}
    for dataset in arguments.datasets:
        wanted = wanted_rows(rows[dataset], arguments.recipes)
        make_rows(dataset, rows[dataset], wanted, arguments.seeds, arguments.work.absolute() / dataset, runs)
    hashes = {(dataset, name): row.digest for dataset in DATASETS for name, row in rows[dataset].items()}
    declared = arguments.seeds if arguments.trial else list(dict.fromkeys([*SEEDS, *arguments.seeds]))
    missing = runs.missing(
        ({"dataset": dataset, "recipe": name, "seed": seed}, row.digest)
        for dataset in arguments.datasets
        for name, row in rows[dataset].items()
        for seed in seeds_of(row, declared)
    )
    lines = runs.measured(hashes)
    followers = {dataset: {name for name, row in rows[dataset].items() if row.follows_start} for dataset in DATASETS}
    first = [line for line in lines if line["seed"] in FIRST_SEEDS]
    tables = {
        title: [row for dataset in arguments.datasets for row in table(own, dataset, followers[dataset], INITIAL)]
        for title, own in (("table", lines), ("table_of_first_seeds", first))
    }
    if not arguments.trial:
        what = "regimes A, B and C at equal budgets"
        record = {"primary": PRIMARY, "budget_seconds": BUDGETS, "commits": commits(lines), "missing": missing}
        write_result("quality-regimes", {"what": what, **record, **tables})
    for title, found in tables.items():
        print(f"\n{title}")
        show(found)
    show_missing(missing)


if __name__ == "__main__":
    main()
