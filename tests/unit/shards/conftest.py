from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def png(value: int, side: int = 4) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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
