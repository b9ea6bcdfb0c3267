"""A config as shipped, over several seeds: every measure of every row, with its mean and spread.

Each seed is a whole `sslscale run` in a run directory of its own; labels are read only by the measures. The last epoch
is what counts, and every row is printed: this run's features and the baselines of the config, by the same code.

    python benchmarks/quality.py configs/quickstart.yaml --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_result

MEASURES = ("acc", "nmi", "ari", "silhouette")


def run(config: Path, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One seed's results, and the seconds that the command took."""
    command = [sys.executable, "-m", "sslscale.cli", "run", "-c", str(config), "--run", str(folder), "--json"]
    start = time.perf_counter()
    done = subprocess.run([*command, f"seed={seed}", *overrides], stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads(done.stdout.strip().splitlines()[-1])
    return {"seconds": time.perf_counter() - start, **results}


def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of the features -> measures of their clusters."""
    baselines = {name: result["measures"] for name, result in results.get("baselines", {}).items()}
    return {**baselines, "this run": results["cluster"]["measures"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="settings that override the config")
    arguments = parser.parse_args()
    seeds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in arguments.seeds:
            results = run(arguments.config, seed, Path(temporary) / str(seed), arguments.overrides)
            seeds.append(
                {
                    "seed": seed,
                    "seconds": results["seconds"],
                    "training_seconds": results["pretrain"]["seconds"],
                    "rows": rows(results),
                    "anomaly": results["anomaly"]["measures"],
                }
            )
            print(json.dumps(seeds[-1]), file=sys.stderr)
    table = {
        name: {
            measure: {
                "mean": statistics.mean(values),
                "stdev": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": values,
            }
            for measure in MEASURES
            for values in [[seed["rows"][name][measure] for seed in seeds]]
        }
        for name in seeds[0]["rows"]
    }
    for name, measures in table.items():
        print(f"{name:<10}" + "".join(f"  {measure} {measures[measure]['mean']:.3f}" for measure in MEASURES))
    what = f"clusters of {arguments.config.name} as shipped, last epoch, labels only to measure"
    write_result(
        f"quality-{arguments.config.stem}",
        {"what": what, "overrides": arguments.overrides, "table": table, "seeds": seeds},
    )


if __name__ == "__main__":
    main()
