from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tars import encode_png, write_tar


def png(value: int, side: int = 4) -> bytes:
    return encode_png(np.full((side, side), value, np.uint8))


@pytest.fixture
def make_shards(tmp_path):
    """`make_shards([3, 5])` writes two shards of grey images whose value is their global id; returns the folder."""

    def make(counts: list[int], side: int = 4) -> Path:
        number = 0
        for shard, count in enumerate(counts):
            members = []
            for _ in range(count):
                members += [(f"s{number:04d}.cls", b"%d" % (number % 3)), (f"s{number:04d}.png", png(number, side))]
                number += 1
            write_tar(tmp_path / "shards" / f"train-{shard:05d}.tar", members)
        return tmp_path / "shards"

    return make


@pytest.fixture(name="write_tar")
def write_tar_fixture():
    return write_tar


@pytest.fixture(name="png")
def png_fixture():
    return png
