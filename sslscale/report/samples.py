"""How a sample is shown: read back from its shard, as a picture or a snippet that lies inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sslscale.config import RunConfig
from sslscale.pretrain.stage import dataset_shards
from sslscale.rundir import RunDir
from sslscale.shards.dataset import ShardSet
from sslscale.shards.decode import DecodeError, decode_image
from sslscale.shards.tar import IMAGES, SampleError
from sslscale.shards.text import text_of
from sslscale.shards.video import decode_clip

SIDE = 96  # pixels of a thumbnail's longer side: shown at half of that, sharp on screens of double density
FRAMES = 6  # of a clip's filmstrip
SNIPPET = 160  # characters of a text


@dataclass(frozen=True)
class Shown:
    """A sample on the page: `image`, a data URI, or `text`; neither where `problem` says why."""

    dataset: str
    key: str
    label: int | None
    image: str | None
    problem: str | None = None
    text: str | None = None


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
                image, text, problem = None, None, None
                if tar is None or tar.keys[record["offset"] : record["offset"] + 1] != [record["key"]]:
                    problem = f"no longer in {shard}"
                else:
                    try:
                        image, text = appearance(tar.read(record["offset"]))
                    except SampleError as error:
                        problem = error.reason
                shown[index] = Shown(dataset, record["key"], record.get("label"), image, problem, text)
        return [shown[index] for index in range(len(records))]

    def _dataset(self, name: str) -> ShardSet:
        if name not in self._shards:
            self._shards[name] = dataset_shards(self.run, self.config, name)
        return self._shards[name]


def appearance(sample: dict[str, Any]) -> tuple[str | None, str | None]:
    """What a sample looks like: (a data URI, None) or (None, a text), by its first member that can be shown.

    Raises SampleError where it holds none, or where that cannot be decoded.
    """
    for extension in sample:
        show = _SHOWN.get(extension.rpartition(".")[2])
        if show is not None:
            return show(sample)
    raise DecodeError("no image, text or video among the members")


def picture(sample: dict[str, Any]) -> tuple[str, None]:
    """The image as a thumbnail."""
    return thumbnail(decode_image(sample, channels=3, size=None)), None


def snippet(sample: dict[str, Any]) -> tuple[None, str]:
    """The beginning of the text, in one line."""
    text = " ".join(text_of(sample)[: 4 * SNIPPET].split())
    return None, text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…"


def filmstrip(sample: dict[str, Any]) -> tuple[str, None]:
    """Frames of the clip, spread evenly over it, side by side."""
    frames = decode_clip(sample, FRAMES, channels=3, size=None)  # (T, 3, H, W)
    return thumbnail(np.concatenate(list(frames), axis=2), side=SIDE * FRAMES), None


_SHOWN: dict[str, Callable[[dict[str, Any]], tuple[str | None, str | None]]] = {
    **dict.fromkeys(IMAGES, picture),
    "txt": snippet,
    "mp4": filmstrip,
}


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> str:
    """uint8 (3, H, W) -> a data URI: a PNG, enlarged by a whole factor (pixels stay pixels), or a JPEG, shrunk."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if (pixels == pixels[:1]).all():
        image = image.convert("L")
    longer = max(image.size)
    data = io.BytesIO()
    if longer > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(data, "JPEG", quality=85)  # a fifth of a PNG's bytes, of a picture that was resampled anyway
        kind = "jpeg"
    else:
        factor = side // longer
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(data, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
