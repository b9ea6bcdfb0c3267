"""Reading shards: ours against webdataset's own pipeline, on the same tars with the same decode.

    python benchmarks/read_shards.py

Two datasets: 28x28 grey PNGs, and photographs as JPEGs of about 100 KB that are decoded to 224x224; each with a
`.cls`. Samples a second, one thread, median of 5 interleaved runs; ours must be at least as fast (ratio >= 1.0).
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from common import interleave, write_result
from PIL import Image
from sklearn.datasets import load_sample_images

from sslscale.shards.dataset import ShardSet, open_shards
from sslscale.shards.decode import decode_image
from sslscale.shards.plan import Cursor, Span
from sslscale.shards.stream import StreamReader, read_spans


def small_pngs(count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(load_sample_images().images[0]).convert("L")
    for index in range(count):
        x, y = rng.integers(0, coarse.width - 112), rng.integers(0, coarse.height - 112)
        yield sample(index, coarse.crop((x, y, x + 112, y + 112)).resize((28, 28)), "png")


def photographs(count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for index in range(count):
        x, y = rng.integers(0, 640 - 560), rng.integers(0, 427 - 400)
        yield sample(index, photos[index % 2].crop((x, y, x + 560, y + 400)), "jpeg", quality=95)


def sample(index: int, image: Image.Image, format: str, **options: Any) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, format, **options)
    return {"__key__": f"{index:06d}", format: data.getvalue(), "cls": str(index % 10).encode()}


def write_shards(folder: Path, samples: Iterator[dict[str, Any]], per_shard: int) -> float:
    """Returns the mean size of an image in bytes."""
    folder.mkdir()
    sizes = []
    with wds.ShardWriter(f"{folder}/s-%05d.tar", maxcount=per_shard, encoder=False, verbose=0) as writer:
        for one in samples:
            writer.write(one)
            sizes.append(sum(len(data) for name, data in one.items() if name in ("png", "jpeg")))
    return float(np.mean(sizes))


def consume(samples: Iterator[Any], decode: Callable[[dict[str, Any]], Any] | None) -> None:
    for one in samples:
        if decode is not None:
            decode(one)


def runs(shards: ShardSet, decode: Callable[[dict[str, Any]], Any] | None) -> dict[str, Callable[[], None]]:
    urls = [info.url for info in shards.shards]
    spans = [Span(index, 0, count) for index, count in enumerate(shards.counts.tolist())]

    def stream() -> Iterator[dict[str, Any]]:
        reader = StreamReader(shards, 0, 1, seed=0, shuffle_block=16384, cursor=Cursor())
        for _ in range(len(reader)):
            yield reader.next().data  # type: ignore[union-attr]

    return {
        "webdataset": lambda: consume(iter(wds.WebDataset(urls, shardshuffle=False)), decode),
        "sslscale": lambda: consume((one.data for one in read_spans(shards, spans)), decode),  # type: ignore[union-attr]
        "sslscale_shuffled_stream": lambda: consume(stream(), decode),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    result: dict[str, Any] = {"repeats": repeats, "unit": "samples/s, one thread", "datasets": {}}
    sources = {"png28": (small_pngs, 8192, 1, None), "jpeg100k": (photographs, 384, 3, 224)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, count, channels, size) in sources.items():
            mean_bytes = write_shards(Path(folder, name), make(count), per_shard=count // 4)
            shards = open_shards(str(Path(folder, name)))
            figures: dict[str, Any] = {"samples": count, "mean_image_bytes": round(mean_bytes)}
            for mode, decode in [("raw", None), ("decoded", partial(decode_image, channels=channels, size=size))]:
                seconds = interleave(runs(shards, decode), repeats)
                figures[mode] = {run: round(count / median) for run, median in seconds.items()}
                figures[mode]["ratio"] = round(seconds["webdataset"] / seconds["sslscale"], 3)
            result["datasets"][name] = figures
    write_result("read-shards", result)


if __name__ == "__main__":
    main()
