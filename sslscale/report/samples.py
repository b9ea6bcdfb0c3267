"""How a sample is shown: read back from its shard, as a picture that lies inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sslscale.config import RunConfig
from sslscale.pretrain.stage import dataset_shards
from sslscale.rundir import RunDir
from sslscale.shards.dataset import ShardSet
from sslscale.shards.decode import decode_image
from sslscale.shards.tar import SampleError

SIDE = 96  # pixels of a thumbnail's longer side: shown at half of that, sharp on screens of double density


@dataclass(frozen=True)
class Shown:
    """A sample on the page. `image` is a data URI, or None where `problem` says why there is none."""

    dataset: str
    key: str
    label: int | None
    image: str | None
    problem: str | None = None


class SampleReader:
    """Reads samples back by what a feature part's table says of them: dataset, shard and record."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self.run, self.config = run, config
        self._shards: dict[str, ShardSet] = {}

    def show(self, records: Sequence[Mapping[str, Any]]) -> list[Shown]:
        """The samples of `records` (`dataset, key, shard, offset[, label]`), in order; each shard is opened once.

        A record that the shard no longer holds under its key is shown as that; UserError where the dataset is gone.
        """
        shown: dict[int, Shown] = {}
        groups: dict[tuple[str, str], list[int]] = {}
        for index, record in enumerate(records):
            groups.setdefault((record["dataset"], record["shard"]), []).append(index)
        for (dataset, shard), indexes in sorted(groups.items()):
            names = [info.name for info in self._dataset(dataset).shards]
            tar = self._dataset(dataset).open(names.index(shard)) if shard in names else None
            for index in indexes:
                record = records[index]
                image, problem = None, None
                if tar is None or tar.keys[record["offset"] : record["offset"] + 1] != [record["key"]]:
                    problem = f"no longer in {shard}"
                else:
                    try:
                        image = picture(tar.read(record["offset"]))
                    except SampleError as error:
                        problem = error.reason
                shown[index] = Shown(dataset, record["key"], record.get("label"), image, problem)
        return [shown[index] for index in range(len(records))]

    def _dataset(self, name: str) -> ShardSet:
        if name not in self._shards:
            self._shards[name] = dataset_shards(self.run, self.config, name)
        return self._shards[name]


def picture(sample: dict[str, Any]) -> str:
    """What a sample looks like, as a data URI. Raises SampleError where it holds no image that can be decoded."""
    return thumbnail(decode_image(sample, channels=3, size=None))


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (3, H, W) -> a data URI: a PNG, enlarged by a whole factor (pixels stay pixels), or a JPEG, shrunk."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if (pixels == pixels[:1]).all():
        image = image.convert("L")
    longer = max(image.size)
    data = io.BytesIO()
    if longer > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(data, "JPEG", quality=85)  # a fifth of a PNG's bytes, of a picture that was resampled anyway
        kind = "jpeg"
    else:
        factor = SIDE // longer
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(data, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
