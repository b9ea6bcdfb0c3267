from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tars import encode_png, write_tar


def grey(generator: np.random.Generator, side: int = 8) -> bytes:
    return encode_png(generator.integers(0, 256, (side, side), dtype=np.uint8))


@pytest.fixture
def write_shard():
    """`write_shard(path, count)` writes a tar of `count` grey 8x8 images, keyed by the tar's name."""

    def write(path: Path, count: int, side: int = 8) -> Path:
        generator = np.random.default_rng([count, *path.stem.encode()])
        return write_tar(path, [(f"{path.stem}-{number:05d}.png", grey(generator, side)) for number in range(count)])

    return write


@pytest.fixture
def shards(tmp_path, write_shard):
    """`tmp_path / "shards"`: 120 images in three shards, one of them empty."""
    for name, count in (("b-0", 70), ("b-1", 0), ("b-2", 50)):
        write_shard(tmp_path / "shards" / f"{name}.tar", count)
    return tmp_path / "shards"
