"""Planted duplicates among 50,000 images of Fashion-MNIST: 1,000 exact ones and 1,000 that are encoded again.

    python benchmarks/dedup.py [--images 50000] [--planted 1000] [--quality 40 95]

Everything by default settings: no labels, no threshold. The images are PNGs; a near duplicate is a JPEG of one at a
quality drawn from the range, or (every tenth) a WebP. Fashion-MNIST has pairs of its own that hardly differ: precision
counts every one that is reported as wrong, and they are counted by themselves too.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import write_result
from PIL import Image

from sslscale.config import RunConfig
from sslscale.dedup.stage import run_dedup
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime
from sslscale.shards.sources.fashion_mnist import FashionMNIST

PER_SHARD = 4096


def encoded(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format, **options)
    return data.getvalue()


def planted(images: np.ndarray, count: int, quality: tuple[int, int]) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """The files of all samples in random order, and key -> key of what it is a duplicate of."""
    generator = np.random.default_rng(0)
    files = [(f"own-{number:06d}.png", encoded(image, "PNG")) for number, image in enumerate(images)]
    truth = {}
    for number, original in enumerate(generator.choice(len(images), 2 * count, replace=False).tolist()):
        if number < count:
            name, data = f"exact-{number:06d}.png", files[original][1]
        else:
            format, suffix = ("WEBP", "webp") if number % 10 == 0 else ("JPEG", "jpg")
            name = f"near-{number:06d}.{suffix}"
            data = encoded(images[original], format, quality=int(generator.integers(*quality, endpoint=True)))
        files.append((name, data))
        truth[name.partition(".")[0]] = f"own-{original:06d}"
    generator.shuffle(files)
    return files, truth


def write_shards(folder: Path, files: list[tuple[str, bytes]]) -> None:
    for shard, start in enumerate(range(0, len(files), PER_SHARD)):
        with tarfile.open(folder / f"s-{shard:05d}.tar", "w") as tar:
            for name, data in files[start : start + PER_SHARD]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--planted", type=int, default=1000, help="of each kind")
    parser.add_argument("--quality", type=int, nargs=2, default=(40, 95))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    images = FashionMNIST().data["train"][0][: arguments.images]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "shards").mkdir()
        files, truth = planted(images, arguments.planted, tuple(arguments.quality))
        write_shards(folder / "shards", files)
        config = RunConfig.model_validate(
            {
                "datasets": {"train": str(folder / "shards")},
                "runtime": {"name": "local", "workers": arguments.workers},
            }
        )
        start = time.perf_counter()
        with RunDir(folder / "run") as run:
            result = run_dedup(run, config, make_runtime("local"))
        seconds = time.perf_counter() - start
        table = pq.read_table(folder / "run" / "dedup" / "main" / "duplicates.parquet").to_pylist()
    group_of = {row["key"]: row["group"] for row in table}
    hit = {copy: copy in group_of and group_of[copy] == group_of.get(original) for copy, original in truth.items()}
    exact = [hit[copy] for copy in truth if copy.startswith("exact")]
    near = [hit[copy] for copy in truth if copy.startswith("near")]
    own_pairs = sum(row["kind"] != "kept" and row["key"] not in truth for row in table) - sum(
        row["kind"] == "kept" and row["key"] in truth and hit[row["key"]] for row in table
    )
    write_result(
        "dedup",
        {
            "settings": vars(arguments),
            "seconds": seconds,
            "exact_recall": float(np.mean(exact)),
            "near_recall": float(np.mean(near)),
            "near_precision": sum(near) / (sum(near) + own_pairs),
            "own_pairs_reported": own_pairs,
            "result": {key: value for key, value in result.items() if isinstance(value, int)},
            "required": {"exact_recall": 1.0, "near_recall": 0.98, "near_precision": 0.98},
        },
    )


if __name__ == "__main__":
    main()
