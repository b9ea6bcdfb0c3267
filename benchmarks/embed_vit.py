"""Embedding with ViT-S/16 at 224 on 100 KB JPEGs against a bare loop with the same decode and threads.

Ours: spans of tar shards, decode threads, fixed-shape batches, normalised fp16 rows, keys, hashes, parts on disk. Bare:
the same JPEG bytes in memory, the same decoder in as many threads, the same model and batch size; nothing is written.

    python benchmarks/embed_vit.py [--samples 128] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from common import interleave, write_result
from PIL import Image

from sslscale.config import BackboneConfig
from sslscale.embed.worker import EmbedWorker
from sslscale.models.image import Backbone, export_backbone
from sslscale.models.load import EmbedderSpec
from sslscale.runtime.base import compute_threads
from sslscale.shards.decode import decode_image
from sslscale.shards.plan import Span
from sslscale.views.image import to_float

VIT = BackboneConfig(architecture="vit_small_patch16_224")
BATCH = 16


def photographs(count: int) -> list[bytes]:
    """JPEGs of about 100 KB: smooth random fields with texture, 512 x 384, as a camera's compress."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC), np.float32)
        picture += rng.normal(0, 14, (384, 512, 1)) + rng.normal(0, 6, (384, 512, 3))
        data = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        made.append(data.getvalue())
    return made


@torch.no_grad()
def bare(model: Backbone, pictures: list[bytes], threads: int) -> None:
    ahead: deque[Future[np.ndarray]] = deque()
    source = iter(pictures)
    with ThreadPoolExecutor(threads) as pool:

        def submit(count: int) -> None:
            for data in itertools.islice(source, count):
                ahead.append(pool.submit(decode_image, {"jpg": data}, 3, 224))

        submit(3 * BATCH)
        while ahead:
            images = [ahead.popleft().result() for _ in range(min(BATCH, len(ahead)))]
            submit(BATCH)
            features = model(to_float(torch.from_numpy(np.stack(images))))
            torch.nn.functional.normalize(features, dim=1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pictures = photographs(arguments.samples)
    with tempfile.TemporaryDirectory() as temporary, compute_threads(arguments.threads):
        folder = Path(temporary)
        with wds.TarWriter(str(folder / "a.tar"), encoder=False) as tar:
            for i, data in enumerate(pictures):
                tar.write({"__key__": f"{i:06d}", "jpg": data})
        torch.manual_seed(0)
        model = Backbone(VIT).eval()
        dim = model.feature_dim
        sha256 = export_backbone(VIT, model.model.state_dict(), folder / "backbone", feature_dim=dim, size=224)
        worker = EmbedWorker(
            store=str(folder / "store"),
            shards=str(folder),
            cache=str(folder / "cache"),
            spec=EmbedderSpec("vit", str(folder / "backbone"), 3, 224, sha256),
            batch_size=BATCH,
            dtype="fp16",
            normalize=True,
            decode_threads=arguments.threads,
            device="cpu",
        )
        seconds = interleave(
            {
                "bare": lambda: bare(model, pictures, arguments.threads),
                "ours": lambda: worker.embed((0, [Span(0, 0, len(pictures))])),
            },
            arguments.repeats,
        )
    write_result(
        "embed-vit",
        {
            "what": "images/s of ViT-S/16 at 224 on JPEGs, ours and a bare loop with the same decode and threads",
            "settings": {
                **vars(arguments),
                "batch": BATCH,
                "mean_kilobytes": sum(map(len, pictures)) / len(pictures) / 1e3,
            },
            "images_per_second": {name: len(pictures) / value for name, value in seconds.items()},
            "ratio": seconds["bare"] / seconds["ours"],
            "required": 0.92,
        },
    )


if __name__ == "__main__":
    main()
