"""Single records of shards on a store, by ranges of their bytes: a picture on a page is not worth a whole shard.

Nothing says at which byte a record lies, but its number says where about. What lies around that place is read from its
first whole header on, and a wider range where the record is not in it.
"""

from __future__ import annotations

import math
import tarfile
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sslscale import storage
from sslscale.shards.dataset import ShardInfo
from sslscale.shards.tar import BLOCK, SampleError, TarShard

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LEAST_BYTES = 2**20  # of a range: a request takes about as long as so many bytes


class NotRead(SampleError):
    """A record that was left where it is, since enough was read from stores."""


class RangeReader:
    """Reads records, and at most `allowance` bytes in doing so: what would take more raises NotRead."""

    def __init__(self, allowance: int) -> None:
        self.allowance = allowance
        # One for all pieces: TarShard keeps what it has read open for a while.
        self._file = tempfile.NamedTemporaryFile(prefix="sslscale-", suffix=".tar")  # noqa: SIM115

    def spend(self, size: int) -> None:
        """Takes `size` bytes off the allowance. Raises NotRead where it has fewer left."""
        if size > self.allowance:
            raise NotRead("not read: it lies in a remote shard")
        self.allowance -= size

    def read(self, fs: AbstractFileSystem, source: str, info: ShardInfo, record: int, key: str) -> dict[str, Any]:
        """The sample of this key, which was embedded as the `record`-th of the shard at `source`.

        Raises SampleError where the shard holds no such key, and what TarShard.read raises.
        """
        for start, stop in ranges(info, record):
            self.spend(stop - start)
            data = storage.retrying(fs.cat_file, source, start=start, end=stop)
            self.allowance -= max(0, len(data) - (stop - start))  # a web server may answer with the whole file
            sample = self._find(data, key, begins=start == 0, ends=stop == info.bytes)
            if sample is not None:
                return sample
        raise SampleError(f"no longer in {info.name}")

    def _find(self, data: bytes, key: str, begins: bool, ends: bool) -> dict[str, Any] | None:
        """The sample of this key in a piece of a tar; the first and the last one there may be cut, and do not count."""
        first = 0 if begins else _first_header(data)
        if first is None:
            return None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(memoryview(data)[first:])
        self._file.flush()
        tar = TarShard(self._file.name)
        whole = range(not begins, len(tar) - (not ends))
        number = next((number for number in whole if tar.keys[number] == key), None)
        return None if number is None else tar.read(number)


def ranges(info: ShardInfo, record: int) -> Iterator[tuple[int, int]]:
    """Ranges of bytes (start, stop) to look for a record in, each wider than the one before; the last is the shard.

    The first reaches two standard deviations to both sides of where the record is expected, for samples whose sizes
    vary by half of their mean: the sizes before it and those after it are a bridge with both ends held.
    """
    share = min(1.0, (record + 0.5) / max(1, info.kept))
    mean = info.bytes / max(1, info.kept)
    half = max(LEAST_BYTES / 2, mean * (4 + math.sqrt(info.kept * share * (1 - share))))
    start, stop = -1, -1
    while (start, stop) != (0, info.bytes):
        start = max(0, int(share * info.bytes - half) // BLOCK * BLOCK)
        stop = min(info.bytes, math.ceil((share * info.bytes + half) / BLOCK) * BLOCK)
        yield start, stop
        half *= 2


def _first_header(data: bytes) -> int | None:
    """Where the first header in a piece of a tar lies, at a multiple of BLOCK; None where there is none."""
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    marked = (blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)
    for number in np.flatnonzero(marked).tolist():
        try:
            tarfile.TarInfo.frombuf(blocks[number].tobytes(), "utf-8", "surrogateescape")  # checks its sum
        except tarfile.HeaderError:
            continue
        return number * BLOCK
    return None
