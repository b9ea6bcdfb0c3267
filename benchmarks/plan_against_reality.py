"""`sslscale plan` against the runs that it plans: memory of a rank and time, three configs on two ranks.

    python benchmarks/plan_against_reality.py

Each config is planned, then trained by `sslscale pretrain --runtime local`; memory is the most anonymous memory
(RssAnon) of a rank above what its imports take. Planned over real: memory within 20%, time within 30%. Plans and runs
take turns, `--repeats` of each, and medians are compared: a run of some seconds is short beside what a machine does.

`plan` measures as many ranks as the machine has devices for: two here, so this is how it is used. `from_one_rank` is
the same by a short run of one rank and the formulas of plan/model.py alone, which is all that there is for the numbers
of ranks that no machine at hand has; the ranks of this machine share its cores, which those formulas do not know. The
bandwidth between ranks is measured first: an all-reduce of 64 MiB between two processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import write_result

from sslscale.config import load_config
from sslscale.plan.model import Machine
from sslscale.plan.probe import anonymous_bytes
from sslscale.plan.stage import run_plan
from sslscale.shards.write import run_pack

ROOT = Path(__file__).parents[1]
VIT = "architecture: vit_{size}_patch16_224, channels: 1, stem: default, kwargs: {{img_size: 32, patch_size: 8}}"
CONFIGS = {
    "simclr-resnet-zero1": [],
    "mae-vit-tiny-zero2": [
        "pretrain.objective={name: mae}",
        f"pretrain.backbone={{{VIT.format(size='tiny')}}}",
        "pretrain.views.size=32",
        "pretrain.global_batch=128",
        "pretrain.zero_stage=2",
        "pretrain.precision=fp32",
    ],
    "rotation-vit-small-zero3": [
        "pretrain.objective={name: rotation}",
        f"pretrain.backbone={{{VIT.format(size='small')}}}",
        "pretrain.views.size=32",
        "pretrain.global_batch=32",
        "pretrain.zero_stage=3",
        "pretrain.precision=fp32",
    ],
}


def all_reduce_bandwidth() -> float:
    """Bytes a second that one of two ranks sends, in the median of ten all-reduces."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_all_reduce, (folder,), nprocs=2)
        return float(Path(folder, "rate").read_text())


def _all_reduce(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    values, seconds = torch.ones(2**24), []
    for _ in range(10):
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "rate").write_text(str(values.nbytes / sorted(seconds)[5]))  # 2 (N - 1) / N of them
    dist.destroy_process_group()


def import_baseline() -> int:
    script = "from sslscale.plan.probe import anonymous_bytes, import_all; import_all(); print(anonymous_bytes('self'))"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def train(arguments: list[str], run: Path) -> tuple[dict[str, Any], int]:
    """The run's result, and the largest peak of a rank's anonymous memory."""
    command = [sys.executable, "-m", "sslscale.cli", "pretrain", *arguments, "--run", str(run), "--runtime", "local"]
    driver = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: dict[int, int] = defaultdict(int)
    while driver.poll() is None:
        for child in driver.children(recursive=True):
            try:
                peaks[child.pid] = max(peaks[child.pid], anonymous_bytes(child.pid))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        time.sleep(0.02)
    assert driver.returncode == 0, command
    return json.loads((run / "pretrain" / "result.json").read_text()), max(peaks.values())


def compare(plans: dict[str, list[Any]], runs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of what was planned in each way and of the runs' (bytes, seconds); and what is beside what."""
    real_bytes, real_seconds = map(statistics.median, zip(*runs, strict=True))
    row: dict[str, Any] = {"real": {"mib": _mib(real_bytes), "seconds": round(real_seconds, 2)}}
    row["real"]["seconds_of_each"] = [round(seconds, 2) for _, seconds in runs]
    for way, made in plans.items():
        memory = statistics.median(plan.memory_by_zero_stage[plan.zero_stage].total for plan in made)
        seconds = statistics.median(plan.seconds for plan in made)
        row[way] = {
            "ranks_measured": made[0].measured.ranks,
            "mib": _mib(memory),
            "seconds": round(seconds, 2),
            "seconds_of_each": [round(plan.seconds, 2) for plan in made],
            "memory_ratio": round(memory / real_bytes, 3),
            "time_ratio": round(seconds / real_seconds, 3),
        }
    return row


def _mib(count: float) -> float:
    return round(count / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe-steps", type=int, default=12)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    options = parser.parse_args()
    baseline, link = import_baseline(), all_reduce_bandwidth()
    machine = Machine(ranks_per_node=2, link=link, network=link, store=1e9)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = [f"pack.output={folder}/data", f"datasets.train={folder}/data/train"]
        steps = ["pretrain.epochs=null", f"pretrain.steps={options.steps}", "pretrain.evaluate_samples=128"]
        for name in options.configs:
            overrides = [*data, *steps, *CONFIGS[name]]
            file = str(ROOT / "configs" / "quickstart.yaml")
            config = load_config(file, overrides)
            assert config.pack is not None
            run_pack(config.pack)
            ways: dict[str, dict[str, Any]] = {"planned": {}, "from_one_rank": {"probe_ranks": 1}}
            plans: dict[str, list[Any]] = {way: [] for way in ways}
            runs = []
            for repeat in range(options.repeats):
                for way, ranks in ways.items():
                    plans[way].append(run_plan(config, machine, probe_steps=options.probe_steps, **ranks))
                result, peak = train(["-c", file, *overrides], Path(folder, name, str(repeat)))
                runs.append((peak - baseline, result["seconds"]))
            rows[name] = compare(plans, runs)
            print(name, rows[name], flush=True)
    limits = {"import_baseline_mib": round(baseline / 2**20, 1), "all_reduce_gb_per_second": round(link / 1e9, 3)}
    write_result(
        "plan-against-reality", {"steps": options.steps, "repeats": options.repeats, **limits, "configs": rows}
    )


if __name__ == "__main__":
    main()
