"""The three regimes side by side: A (SimCLR, then k-means), B (joint) and C (self-supervision as the objective).

Every B and C row starts from `start`, SimCLR at half of the budget (configs/images/<dataset>/simclr.yaml), and trains
for the other half; `alone` is SimCLR at the whole budget, followed by k-means, so each row is compared with it at an
equal total. The recipes are configs/regimes/<dataset>/*.yaml, frozen before a label of the data that is measured was
read; the last epoch counts. Clusters of B and C are the objective's own, and no label chooses a head. Each run is one
line of --runs, so an interrupted benchmark goes on where it stopped. Every row is printed.

    python benchmarks/quality_regimes.py [--datasets digits] [--recipes joint_scan iic] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from quality_images import recipe_hash
from scipy.stats import t as student

from sslscale.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
START, ALONE, BASELINES = "start", "alone", ("pixels", "hog")
COLUMNS = ("acc", "nmi", "ari", "test_acc", "test_nmi", "test_ari", "bits_saved", "seconds")


def recipes(dataset: str) -> dict[str, Path]:
    """Name -> config, `start` first since the others need it."""
    own = {path.stem: path for path in sorted((CONFIGS / "regimes" / dataset).glob("*.yaml"))}
    return {START: CONFIGS / "images" / dataset / "simclr.yaml", **own}


def measure(name: str, config: Path, seed: int, work: Path, more: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of one run by name; `alone` has the baselines beside it. `more` are further overrides."""
    run, data = work / f"{name}-{seed}", work / "data"
    datasets = [f"datasets.{split}={data}/{split}" for split in load_config(str(config)).datasets]
    overrides = [f"seed={seed}", f"pack.output={data}", *datasets, *more]
    if name == ALONE:
        overrides.append(f"baselines=[{', '.join(BASELINES)}]")
    elif name != START:
        overrides.append(f"pretrain.init_from={work / f'{START}-{seed}'}")
    command = [sys.executable, "-m", "sslscale.cli", "run", "-c", str(config), "--run", str(run), "--json"]
    done = subprocess.run([*command, *overrides], stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads(done.stdout.strip().splitlines()[-1])
    trained = results["pretrain"]
    row = {**_clusters(results["cluster"]), "seconds": trained["seconds"], "epochs": trained["epochs"]}
    rows = {name: {**row, **trained["measures"]}}
    return rows | {key: _clusters(result) for key, result in results.get("baselines", {}).items()}


def _clusters(result: dict[str, Any]) -> dict[str, Any]:
    """ACC, NMI, ARI of all rows or of the training set, and of the test set where there is one."""
    parts = result.get("datasets", {"train": result})
    prefixes = {"train": "", "test": "test_"}
    return {
        f"{prefixes[split]}{name}": part["measures"][name]
        for split, part in parts.items()
        for name in ("acc", "nmi", "ari")
    }


def interval(values: list[float]) -> dict[str, float | None]:
    """The mean, and half the width of its 95% interval by Student's t; None for a single value."""
    if len(values) < 2:
        return {"mean": values[0], "half": None}
    scale = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half": float(student.ppf(0.975, len(values) - 1)) * scale}


def table(lines: list[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
    """One row a recipe: every column's interval, and that of its difference from `alone`, paired by seed."""
    by_key = {(line["recipe"], line["seed"]): line for line in lines if line["dataset"] == dataset}
    rows = []
    for recipe in sorted({recipe for recipe, _ in by_key}):
        own = {seed: line for (name, seed), line in by_key.items() if name == recipe}
        row: dict[str, Any] = {"dataset": dataset, "recipe": recipe, "seeds": sorted(own)}
        for column in COLUMNS:
            values = [line[column] for line in own.values() if column in line]
            row[column] = interval(values) if values else None
        for column in ("acc", "nmi"):
            for base in (ALONE, START):
                pairs = [
                    line[column] - by_key[base, seed][column] for seed, line in own.items() if (base, seed) in by_key
                ]
                row[f"{column}_above_{base}"] = interval(pairs) if pairs else None
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = (*COLUMNS, "acc_above_alone", "nmi_above_alone", "nmi_above_start")
    print(f"{'dataset':<14}{'recipe':<14}{'seeds':>5}" + "".join(f"{column:>17}" for column in columns))
    for row in sorted(rows, key=lambda row: (row["dataset"], -row["acc"]["mean"])):
        print(
            f"{row['dataset']:<14}{row['recipe']:<14}{len(row['seeds']):>5}" + "".join(_cell(row[c]) for c in columns)
        )


def _cell(value: dict[str, float | None] | None) -> str:
    if value is None:
        return f"{'':>17}"
    text = f"{value['mean']:.3f}" if value["half"] is None else f"{value['mean']:.3f} ±{value['half']:.3f}"
    return f"{text:>17}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist"])
    parser.add_argument("--recipes", nargs="+", help="default: all of the dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=RESULTS / "quality-regimes-runs.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs") / "quality_regimes", help="where the runs are kept")
    parser.add_argument("--trial", action="store_true", help="one epoch a run, and no result: whether all of it runs")
    arguments = parser.parse_args()
    more = ["pretrain.epochs=1"] if arguments.trial else []
    if arguments.trial:
        arguments.runs = Path(os.devnull)
        arguments.work = arguments.work / "trial"
    known = [json.loads(line) for line in arguments.runs.read_text().splitlines()] if arguments.runs.is_file() else []
    hashes = {(d, name): recipe_hash(path) for d in ("digits", "fashion_mnist") for name, path in recipes(d).items()}
    lines = [line for line in known if line["config"] == hashes.get((line["dataset"], line["of"]))]
    for dataset in arguments.datasets:
        for seed in arguments.seeds:
            for name, config in recipes(dataset).items():
                wanted = name == START or name in (arguments.recipes or [name])
                done = {(line["dataset"], line["recipe"], line["seed"]) for line in lines}
                started = (arguments.work / dataset / f"{START}-{seed}" / "pretrain" / "backbone").is_dir()
                if not wanted or ((dataset, name, seed) in done and (name != START or started)):
                    continue
                for recipe, row in measure(name, config, seed, arguments.work.absolute() / dataset, more).items():
                    if (dataset, recipe, seed) not in done:
                        key = {"dataset": dataset, "recipe": recipe, "seed": seed, "of": name}
                        lines.append({**key, "config": hashes[dataset, name], **row})
                        print(json.dumps(lines[-1]), file=sys.stderr)
                arguments.runs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [row for dataset in arguments.datasets for row in table(lines, dataset)]
    if not arguments.trial:
        write_result("quality-regimes", {"what": "regimes A, B and C at equal budgets", "table": rows})
    show(rows)


if __name__ == "__main__":
    main()
