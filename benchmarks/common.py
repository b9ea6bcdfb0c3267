"""What every benchmark shares: interleaved timing, the machine's name, where results go."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sslscale.runtime.device import multiplies_bf16

RESULTS = Path(__file__).parent / "results"
PART_ROWS = 2**18
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "webdataset",
    "deepspeed",
    "ray",
    "faiss-cpu",
    "faiss-gpu",
    "timm",
    "transformers",
    "av",
)


def take_turns(runs: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of each run, a turn: the runs take turns, so that what else the machine does strikes all alike.

    Every run is called once before, untimed.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        turns = list(runs.items())
        for name, run in turns if repeat % 2 == 0 else reversed(turns):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of what was measured in the same turn, sorted: a machine whose speed wanders from turn to turn moves both."""
    return sorted(a / b for a, b in zip(over, under, strict=True))


def interleave(runs: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each run; see `take_turns`."""
    return medians(take_turns(runs, repeats))


def matrix_rate(threads: int) -> float:
    """FLOP/s of a large product of fp32 matrices."""
    from sslscale.runtime.base import compute_threads

    a = np.ones((4096, 4096), np.float32)
    with compute_threads(threads):
        return 2 * 4096**3 / interleave({"product": lambda: a @ a})["product"]


def random_store(folder: Path, rows: int, dim: int, noise: float) -> None:
    """A feature store of fp16 rows around 4,096 centres, in parts of 2^18; their tables are left out: nothing here
    reads them.
    """
    from sslscale.features.files import write_npy
    from sslscale.features.store import FORMAT_VERSION
    from sslscale.rundir import write_json

    generator = np.random.default_rng(0)
    centres = generator.standard_normal((4096, dim), dtype=np.float32)
    parts = []
    for part, start in enumerate(range(0, rows, PART_ROWS)):
        size = min(PART_ROWS, rows - start)
        around = generator.standard_normal((size, dim), dtype=np.float32) * noise
        own = centres[generator.integers(0, len(centres), size)]
        write_npy(folder / f"part-{part:05d}.npy", (own + around).astype(np.float16))
        parts.append({"part": part, "rows": size, "sha256": str(part), "table_sha256": ""})
    record = {"dim": dim, "dtype": "fp16", "normalized": False, "backbone": "random", "parts": parts}
    write_json(folder / "features.json", {"format_version": FORMAT_VERSION, "num_rows": rows, **record})


def write_store(folder: Path, x: np.ndarray, dtype: str = "fp32") -> None:
    """The features of a run: rows (n, D) as its dataset `train`, in parts of 2^18, keyed by their number."""
    from sslscale.features import FeatureStore

    store = FeatureStore.create(folder / "embed" / "train", dim=x.shape[1], dtype=dtype, normalized=False, backbone="b")
    records = []
    for part, start in enumerate(range(0, len(x), PART_ROWS)):
        rows = x[start : start + PART_ROWS]
        keys = [str(start + row) for row in range(len(rows))]
        records.append(store.write_part(part, rows, keys, ["s"] * len(rows), range(len(rows))))
    store.commit(records)


def list_records(location: str, kept: Sequence[np.ndarray], path: Path) -> str:
    """Writes `path`, a list of the records at `location` where `kept` (bool, one array a shard) is true; returns it."""
    from sslscale.shards.dataset import open_shards, write_filtered

    parts = zip(open_shards(location).shards, kept, strict=True)
    write_filtered(path, [info.without(np.flatnonzero(~mask).tolist()) for info, mask in parts])
    return str(path)


def hardware() -> dict[str, Any]:
    """`name` is short and fit for a file name; the rest says exactly what ran."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0))
    name = f"{len(gpus)}x{gpus[0]}" if gpus else f"cpu{cores}"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cpu": _cpu_model(),
        "cores": cores,
        "bf16": multiplies_bf16(torch.device("cpu")),  # processors with and without it can have one name
        "gpus": gpus,
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := _version(package))},
    }


def write_result(claim: str, result: Mapping[str, Any]) -> Path:
    """Writes results/<claim>-<hardware>-<date>.json, prints it, and returns its path."""
    machine, today = hardware(), datetime.date.today().isoformat()
    path = RESULTS / f"{claim}-{machine['name']}-{today}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"claim": claim, "date": today, "hardware": machine, **result}, indent=2)
    path.write_text(text + "\n")
    print(text, path, sep="\n")
    return path


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
