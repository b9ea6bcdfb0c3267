"""Held-out clips of moving digits: clusters of features trained on the clips against those of mean frames.

The recipes are configs/video/*.yaml, one an objective, frozen before a label was read. K-means with 6 for the pair of
motions and with 10 for the digit, on the clips of `test`, whose digits are not in `train`; labels are read only by the
measures. Every row is printed, also that of a training which its guard stopped.

    python benchmarks/quality_video.py [--recipes frame_order video_mae] [--seeds 0 1 2]
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
from common import write_result

from sslscale.cluster import KMeans
from sslscale.cluster.measures import label_measures
from sslscale.config import load_config
from sslscale.features import open_features
from sslscale.rundir import RunDir
from sslscale.shards.sources.moving_digits import MOTIONS, MovingDigits

CONFIGS = Path(__file__).parents[1] / "configs" / "video"
CLUSTERS = {"motion": len(MOTIONS), "digit": 10}
ONLY_FEATURES = ("index=null", "cluster=null", "anomaly=null", "report=null", "embed.datasets=[test]")


def features(
    folder: Path, config: Path, data: Path, *overrides: str
) -> tuple[np.ndarray, list[int], dict[str, Any]] | None:
    """Rows of `test`, the number of each clip, and what the run said; None where it failed."""
    command = [sys.executable, "-m", "sslscale.cli", "run", "-c", str(config), "--run", str(folder), "--json"]
    shared = [f"pack.output={data}", f"datasets.train={data}/train", f"datasets.test={data}/test", "baselines=[]"]
    done = subprocess.run([*command, *shared, *ONLY_FEATURES, *overrides], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    found = open_features(RunDir(folder), ["test"])
    ids = found.row_ids(np.arange(found.num_rows))
    numbers = [int(key.rpartition("-")[2]) for key in found.keys_of(ids)]
    return found.take(ids).astype(np.float32), numbers, json.loads(done.stdout.strip().splitlines()[-1])


def measure(x: np.ndarray, labels: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """The measures of each label."""
    measured = {}
    for name, truth in labels.items():
        assignments = KMeans(CLUSTERS[name], num_init=10, random_state=seed).fit(x).labels_
        found = label_measures(truth, assignments)
        measured[name] = {measure: found[measure] for measure in ("nmi", "ari", "acc")}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    whole = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--recipes", nargs="+", default=whole, choices=whole)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="settings that override the config")
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        for seed in arguments.seeds:
            for recipe in [*arguments.recipes, "mean_frame"]:
                trained = recipe != "mean_frame"
                config = CONFIGS / f"{recipe if trained else arguments.recipes[0]}.yaml"
                pixels = ["pretrain=null", "embed.backbone=mean_frame", "embed.output=pooled", "embed.size=32"]
                pixels += ["embed.channels=1"]
                more = [f"seed={seed}", *([] if trained else pixels), *arguments.overrides]
                made = features(Path(temporary, f"{recipe}-{seed}"), config, data, *more)
                if made is None:
                    print(f"{recipe}, seed {seed}: the run failed", file=sys.stderr)
                    failed.append({"recipe": recipe, "seed": seed})
                    continue
                x, numbers, said = made
                options = load_config(str(config)).pack.options  # type: ignore[union-attr]
                source = MovingDigits(**options)
                truth = [source.clip("test", number)[1] for number in numbers]
                labels = {name: np.array([clip[name] for clip in truth]) for name in CLUSTERS}
                seconds = said["pretrain"]["seconds"] if trained else 0.0
                lines.append({"recipe": recipe, "seed": seed, "seconds": seconds, **measure(x, labels, seed)})
                print(json.dumps(lines[-1]), file=sys.stderr)
    table = {
        recipe: {
            label: {
                name: statistics.mean(line[label][name] for line in lines if line["recipe"] == recipe)
                for name in ("nmi", "ari", "acc")
            }
            for label in CLUSTERS
        }
        for recipe in [*arguments.recipes, "mean_frame"]
        if any(line["recipe"] == recipe for line in lines)
    }
    for recipe, row in table.items():
        print(
            f"{recipe:<14}seeds: {sum(line['recipe'] == recipe for line in lines)}"
            + "".join(f"  {label} nmi {row[label]['nmi']:.3f} acc {row[label]['acc']:.3f}" for label in CLUSTERS)
        )
    made = {(line["recipe"], line["seed"]) for line in lines}
    rows = [(recipe, seed) for recipe in [*whole, "mean_frame"] for seed in arguments.seeds]
    missing = [{"recipe": recipe, "seed": seed} for recipe, seed in rows if (recipe, seed) not in made]
    for row in missing:
        print(f"MISSING {row['recipe']}, seed {row['seed']}")
    write_result(
        "quality-video",
        {
            "what": "k-means of held-out clips, 6 pairs of motions and 10 digits; labels only to measure",
            "overrides": arguments.overrides,
            "table": table,
            "runs": lines,
            "failed": failed,
            "missing": missing,
        },
    )


if __name__ == "__main__":
    main()
