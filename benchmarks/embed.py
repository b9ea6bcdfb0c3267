"""Embedding against a bare loop, against Ray Data, and with two workers against one.

    python benchmarks/embed.py [--claims vit resnet workers ray] [--repeats 5]

vit      ViT-S/16 at 224 on JPEGs of about 100 KB, against a bare loop: the same bytes in memory, the same decoder in as
         many threads, the same model and batch; nothing is written
resnet   the same for the ResNet of configs/fashion_mnist.yaml on 28x28 PNGs
workers  two workers against one, one thread each (decoding in it, too), the ViT
ray      two workers on Ray against `ray.data.read_webdataset().map_batches` with two actors of the same model, one
         thread each, on the same shards of small PNGs; both write their features, and start their processes in every
         turn ("ours" beside it: processes that are there)

Ours is the whole work of a part: spans of tar shards, decoding, fixed-shape batches, normalised fp16 rows, keys,
content hashes, files. Runs are interleaved and their medians compared. The limits beside it: decoding alone, the model
alone.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from common import interleave, write_result
from PIL import Image

from sslscale.config import BackboneConfig, load_config
from sslscale.embed.worker import EmbedWorker
from sslscale.models.export import export_backbone, load_backbone
from sslscale.models.image import Backbone
from sslscale.models.load import EmbedderSpec
from sslscale.runtime.base import Resources, compute_threads, make_runtime
from sslscale.shards.dataset import open_shards
from sslscale.shards.decode import decode_image
from sslscale.shards.plan import Span
from sslscale.views.image import to_float

CONFIGS = Path(__file__).parent.parent / "configs"
REQUIRED = {"vit": 0.95, "resnet": 0.95, "workers": 1.7, "ray": 1.5}


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


def small_pngs(count: int) -> list[bytes]:
    """28x28 grey PNGs: smooth random fields."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        data = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
        small.resize((28, 28), Image.Resampling.BICUBIC).save(data, "PNG")
        made.append(data.getvalue())
    return made


@dataclass(frozen=True)
class Case:
    """One model on one kind of image, in shards of a folder."""

    folder: Path
    images: list[bytes]
    extension: str
    size: int
    batch: int
    spec: EmbedderSpec

    @classmethod
    def make(cls, folder: Path, images: list[bytes], extension: str, config: BackboneConfig, size: int, batch: int):
        (folder / "shards").mkdir(parents=True)
        shard = -(-len(images) // 4)
        with wds.ShardWriter(f"{folder}/shards/s-%05d.tar", maxcount=shard, encoder=False, verbose=0) as writer:
            for number, data in enumerate(images):
                writer.write({"__key__": f"{number:06d}", extension: data})
        torch.manual_seed(0)
        model = Backbone(config)
        sha256 = export_backbone(model, model.model.state_dict(), folder / "backbone", size=size)
        spec = EmbedderSpec("benchmark", str(folder / "backbone"), config.channels, size, sha256)
        return cls(folder, images, extension, size, batch, spec)

    def setup(self, decode_threads: int) -> dict[str, Any]:
        return {
            "store": str(self.folder / "store"),
            "shards": open_shards(str(self.folder / "shards")),
            "spec": self.spec,
            "batch_size": self.batch,
            "dtype": "fp16",
            "normalize": True,
            "decode_threads": decode_threads,
            "device": "cpu",
        }

    def parts(self, count: int) -> list[tuple[int, list[Span]]]:
        """The samples in `count` parts, each of whole shards."""
        counts = open_shards(str(self.folder / "shards")).counts.tolist()
        spans = [Span(shard, 0, samples) for shard, samples in enumerate(counts)]
        return [(part, spans[part::count]) for part in range(count)]


def vit(folder: Path, samples: int) -> Case:
    config = BackboneConfig(architecture="vit_small_patch16_224")
    return Case.make(folder, photographs(samples), "jpg", config, size=224, batch=16)


def resnet(folder: Path, samples: int) -> Case:
    config = load_config(str(CONFIGS / "fashion_mnist.yaml"), []).pretrain.backbone  # type: ignore[union-attr]
    return Case.make(folder, small_pngs(samples), "png", config, size=28, batch=256)


@torch.inference_mode()
def bare(model: Backbone, case: Case, threads: int) -> None:
    """Decodes in threads, some images a task, at least a batch ahead of the model."""
    task = min(32, max(1, case.batch // (4 * threads)))
    chunks = iter(case.images[start : start + task] for start in range(0, len(case.images), task))

    def decode(data: list[bytes]) -> list[np.ndarray]:
        return [decode_image({case.extension: one}, case.spec.channels, case.size) for one in data]

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[list[np.ndarray]]] = deque()
        depth = case.batch // task + 2 * threads
        ahead.extend(pool.submit(decode, chunk) for chunk in itertools.islice(chunks, depth))
        images: list[np.ndarray] = []
        while ahead:
            images += ahead.popleft().result()
            ahead.extend(pool.submit(decode, chunk) for chunk in itertools.islice(chunks, 1))
            if len(images) >= case.batch or not ahead:
                batch, images = images[: case.batch], images[case.batch :]
                features = model(to_float(torch.from_numpy(np.stack(batch))))
                torch.nn.functional.normalize(features, dim=1).numpy()


def against_bare(case: Case, repeats: int, threads: int) -> dict[str, Any]:
    with compute_threads(threads):
        worker, model = EmbedWorker(**case.setup(threads)), load_backbone(case.folder / "backbone")
        [part] = case.parts(1)
        images = [decode_image({case.extension: data}, case.spec.channels, case.size) for data in case.images]
        batches = [torch.from_numpy(np.stack(images[at : at + case.batch])) for at in range(0, len(images), case.batch)]

        @torch.inference_mode()
        def model_alone() -> None:
            for batch in batches:
                model(to_float(batch))

        def decode_alone() -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(
                    pool.map(
                        lambda data: decode_image({case.extension: data}, case.spec.channels, case.size), case.images
                    )
                )

        seconds = interleave(
            {
                "bare": lambda: bare(model, case, threads),
                "ours": lambda: worker.embed(part),
                "model alone": model_alone,
                "decoding alone": decode_alone,
            },
            repeats,
        )
    return _rates(case, seconds, seconds["bare"] / seconds["ours"])


def workers(case: Case, repeats: int) -> dict[str, Any]:
    """Two workers against one; both pools are of processes, and stay up between the runs."""
    runtime = make_runtime("ray")
    setup, parts = case.setup(0), case.parts(4)
    with (
        runtime.pool(EmbedWorker, setup, 1, Resources(threads=1)) as one,
        runtime.pool(EmbedWorker, setup, 2, Resources(threads=1)) as two,
    ):
        seconds = interleave(
            {"one worker": lambda: list(one.map("embed", parts)), "two workers": lambda: list(two.map("embed", parts))},
            repeats,
        )
    runtime.close()
    return _rates(case, seconds, seconds["one worker"] / seconds["two workers"])


class RayDataModel:
    """What a user of Ray Data writes: decode and embed a batch of rows."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(1)
        self.case, self.model = case, load_backbone(case.folder / "backbone")

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [
            decode_image({self.case.extension: data}, self.case.spec.channels, self.case.size)
            for data in batch[self.case.extension]
        ]
        features = self.model(to_float(torch.from_numpy(np.stack(images))))
        features = torch.nn.functional.normalize(features, dim=1).to(torch.float16)
        return {"key": batch["__key__"], "features": features.numpy()}


def against_ray_data(case: Case, repeats: int) -> dict[str, Any]:
    import ray

    runtime = make_runtime("ray")
    written = itertools.count()
    with runtime.pool(EmbedWorker, case.setup(0), 2, Resources(threads=1)) as pool:
        ray.data.DataContext.get_current().enable_progress_bars = False

        def ray_data() -> None:
            rows = ray.data.read_webdataset(str(case.folder / "shards"), decoder=None, file_extensions=["tar"])
            made = rows.map_batches(
                RayDataModel, fn_constructor_args=(case,), batch_size=case.batch, concurrency=2, num_cpus=1
            )
            made.write_parquet(str(case.folder / "ray-data" / str(next(written))))

        def ours() -> None:
            runtime._warm.clear()  # processes that wait with their imports done: Ray Data starts its own each time
            with runtime.pool(EmbedWorker, case.setup(0), 2, Resources(threads=1)) as fresh:
                list(fresh.map("embed", case.parts(4)))

        seconds = interleave(
            {
                "ray data": ray_data,
                "ours, with its workers' start": ours,
                "ours": lambda: list(pool.map("embed", case.parts(4))),
            },
            repeats,
        )
    runtime.close()
    return _rates(case, seconds, seconds["ray data"] / seconds["ours, with its workers' start"])


def _rates(case: Case, seconds: dict[str, float], ratio: float) -> dict[str, Any]:
    return {
        "samples": len(case.images),
        "mean_kilobytes": sum(map(len, case.images)) / len(case.images) / 1e3,
        "samples_per_second": {name: len(case.images) / value for name, value in seconds.items()},
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", default=list(REQUIRED), choices=list(REQUIRED))
    parser.add_argument("--photographs", type=int, default=192)
    parser.add_argument("--pngs", type=int, default=16384)
    parser.add_argument("--ray-pngs", type=int, default=81920, help="of the claim `ray`, where both start workers")
    parser.add_argument("--repeats", type=int, default=5, help="of the claim `workers`: two more")
    parser.add_argument("--threads", type=int, default=2, help="of the model, and of the decoders, for vit and resnet")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    runs: dict[str, tuple[Callable[[Path, int], Case], int, Callable[[Case], dict[str, Any]]]] = {
        "vit": (vit, arguments.photographs, lambda case: against_bare(case, arguments.repeats, arguments.threads)),
        "resnet": (resnet, arguments.pngs, lambda case: against_bare(case, arguments.repeats, arguments.threads)),
        "workers": (vit, arguments.photographs, lambda case: workers(case, arguments.repeats + 2)),
        "ray": (resnet, arguments.ray_pngs, lambda case: against_ray_data(case, arguments.repeats)),
    }
    for claim in arguments.claims:
        make, samples, run = runs[claim]
        with tempfile.TemporaryDirectory() as temporary:
            found = run(make(Path(temporary), samples))
        write_result(f"embed-{claim}", {"settings": vars(arguments), **found, "required": REQUIRED[claim]})


if __name__ == "__main__":
    main()
