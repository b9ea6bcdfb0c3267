"""How a sample becomes what a backbone takes: one Reader a modality (text.py and video.py hold theirs)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslscale.errors import StageError
from sslscale.shards.decode import decode_image, image_bytes


class Reader:
    """Reads one member of a sample into an array, and arrays into a batch. Small, picklable and used by many threads.

    Whatever it reads is one tensor whose first axis is the batch: what comes after need not know the modality.
    """

    def content(self, sample: dict[str, Any]) -> bytes:
        """The bytes that are read, as they are in the shard. Raises DecodeError where there are none."""
        raise NotImplementedError

    def read(self, sample: dict[str, Any]) -> np.ndarray:
        """The sample's array. Raises DecodeError where it cannot be decoded."""
        raise NotImplementedError

    def collate(self, rows: list[np.ndarray], size: int | None = None, pinned: bool = False) -> Tensor:
        """Arrays of one shape as a batch; with `size`, filled up to so many rows.

        Raises StageError where they differ in shape.
        """
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            raise StageError(
                "the images of a batch differ in shape", got=sorted(shapes), fix="give one size: pretrain.load_size"
            )
        if size is None:
            return torch.from_numpy(np.stack(rows))
        batch = self._zeros((size, *rows[0].shape), pinned)
        np.stack(rows, out=batch.numpy()[: len(rows)])
        return batch

    def _zeros(self, shape: tuple[int, ...], pinned: bool) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)

    def content_hash(self, sample: dict[str, Any]) -> bytes:
        """The sha256 of `content`: 32 bytes, equal for exact duplicates."""
        return hashlib.sha256(self.content(sample)).digest()


@dataclass(frozen=True)
class ImageReader(Reader):
    """uint8 (C, H, W); with `size`, resized and cropped to that side: see decode_image.

    A batch is contiguous; `channels_last` gives it the layout that convolutions are fast in.
    """

    channels: int
    size: int | None
    channels_last: bool = False

    def content(self, sample: dict[str, Any]) -> bytes:
        return image_bytes(sample)

    def read(self, sample: dict[str, Any]) -> np.ndarray:
        return decode_image(sample, self.channels, self.size)

    def _zeros(self, shape: tuple[int, ...], pinned: bool) -> Tensor:
        if not self.channels_last:
            return super()._zeros(shape, pinned)
        rows, channels, height, width = shape
        return super()._zeros((rows, height, width, channels), pinned).permute(0, 3, 1, 2)
