"""How a sample is shown: read back from its shard, as a picture, a filmstrip or a snippet that lies inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from sslscale import storage
from sslscale.config import ReportConfig, RunConfig
from sslscale.pretrain.stage import dataset_shards
from sslscale.report.ranges import NotRead, RangeReader, ranges
from sslscale.rundir import RunDir
from sslscale.shards.dataset import ShardSet
from sslscale.shards.decode import DecodeError, decode_image
from sslscale.shards.tar import IMAGES, SampleError
from sslscale.shards.text import text_of
from sslscale.shards.video import decode_clip

SIDE = 96  # pixels of a thumbnail's longer side: shown at half of that, sharp on screens of double density
FRAMES = 6  # of a clip's filmstrip
SNIPPET = 160  # characters of a text


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """`image`, a data URI, of `frames` side by side; or `text`; neither where `problem` says why."""

    image: str | None = None
    frames: int = 1
    text: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shown(Appearance):
    """A sample on the page."""

    dataset: str
    key: str
    label: int | None


class SampleReader:
    """Reads samples back by what a feature part's table says of them: dataset, shard and record.

    Of shards on a store no more is read than the report's settings allow; `unread` counts what is not shown for that.
    """

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self.run, self.config = run, config
        self.unread = 0
        self._remote = RangeReader(int((config.report or ReportConfig()).fetch_gb * 2**30))
        self._shards: dict[str, ShardSet] = {}
        self._numbers: dict[str, dict[str, int]] = {}  # of each dataset's shards, by name

    def show(self, records: Sequence[Mapping[str, Any]]) -> list[Shown]:
        """The samples of `records` (`dataset, key, shard, offset[, label]`), in order; each shard is opened once.

        A record that the shard no longer holds under its key is shown as that; UserError where the dataset is gone.
        """
        shown: dict[int, Shown] = {}
        groups: dict[tuple[str, str], list[int]] = {}
        for index, record in enumerate(records):
            groups.setdefault((record["dataset"], record["shard"]), []).append(index)
        for (dataset, shard), indexes in sorted(groups.items()):
            read = self._open(dataset, shard, [records[index]["offset"] for index in indexes])
            for index in indexes:
                record = records[index]
                try:
                    look = appearance(read(record["offset"], record["key"]))
                except SampleError as error:
                    self.unread += isinstance(error, NotRead)
                    look = Appearance(problem=error.reason)
                shown[index] = Shown(dataset=dataset, key=record["key"], label=record.get("label"), **vars(look))
        return [shown[index] for index in range(len(records))]

    def _open(self, dataset: str, shard: str, wanted: list[int]) -> Callable[[int, str], dict[str, Any]]:
        """What reads a shard's samples by record and key. A remote one is copied where ranges of it come to as much."""
        shards, number = self._dataset(dataset), self._numbers[dataset].get(shard)
        if number is None:
            return lambda record, key: _gone(shard)
        info = shards.shards[number]
        fs, source = storage.filesystem(info.url)
        if not shards.is_here(number):
            first = [next(ranges(info, record)) for record in wanted]
            if info.bytes > min(self._remote.allowance, sum(stop - start for start, stop in first)):
                return lambda record, key: self._remote.read(fs, source, info, record, key)
            self._remote.spend(info.bytes)
        tar = shards.open(number)
        return lambda record, key: tar.read(record) if tar.keys[record : record + 1] == [key] else _gone(shard)

    def _dataset(self, name: str) -> ShardSet:
        if name not in self._shards:
            self._shards[name] = dataset_shards(self.run, self.config, name)
            self._numbers[name] = {info.name: number for number, info in enumerate(self._shards[name].shards)}
        return self._shards[name]


def _gone(shard: str) -> NoReturn:
    raise SampleError(f"no longer in {shard}")


def appearance(sample: dict[str, Any]) -> Appearance:
    """What a sample looks like, by its first member that can be shown.

    Raises SampleError where it holds none, or where that cannot be decoded.
    """
    for extension in sample:
        show = _SHOWN.get(extension.rpartition(".")[2])
        if show is not None:
            return show(sample)
    raise DecodeError("no image, text or video among the members")


def picture(sample: dict[str, Any]) -> Appearance:
    """The image as a thumbnail."""
    return Appearance(image=thumbnail(decode_image(sample, channels=3, size=None)))


def snippet(sample: dict[str, Any]) -> Appearance:
    """The beginning of the text, in one line."""
    text = " ".join(text_of(sample)[: 4 * SNIPPET].split())
    return Appearance(text=text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…")


def filmstrip(sample: dict[str, Any]) -> Appearance:
    """Frames of the clip, spread evenly over it, side by side."""
    frames = decode_clip(sample, FRAMES, channels=3, size=None)  # (T, 3, H, W)
    return Appearance(image=thumbnail(np.concatenate(list(frames), axis=2), side=SIDE * FRAMES), frames=FRAMES)


_SHOWN: dict[str, Callable[[dict[str, Any]], Appearance]] = {
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
