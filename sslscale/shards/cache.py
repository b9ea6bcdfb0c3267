"""Copies of remote shards on this machine: within a size, and fetched before they are asked for."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sslscale import storage
from sslscale.config import RunConfig
from sslscale.rundir import hash_json

_FETCHERS = ThreadPoolExecutor(2, "sslscale-read-ahead")
_lock = threading.Lock()
_under_way: dict[Path, Future[None]] = {}


@dataclass(frozen=True)
class ShardCache:
    """A folder that processes of this machine may share. Above `limit_bytes` the copies used longest ago are deleted.

    A copy that somebody still reads may be deleted, too: who misses it asks for it again. So a limit below what is
    read at one time (the shards of a shuffle block, times the streams of a machine) costs time, and nothing else.
    """

    folder: Path
    limit_bytes: int

    @classmethod
    def of(cls, config: RunConfig) -> ShardCache:
        """The cache that a run's config names."""
        folder = config.storage.cache or storage.local_path(config.run) / ".cache"
        return cls(Path(folder), int(config.storage.cache_gb * 2**30))

    def copy(self, url: str, size: int) -> Path:
        """The copy of a remote shard of `size` bytes; waits where it is being fetched."""
        path = self._path(url, size)
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now
        except FileNotFoundError:
            self._fetch(path, url, size).result()
        return path

    def read_ahead(self, url: str, size: int) -> None:
        """Begins to fetch a shard; a failure is met again by who asks for it."""
        path = self._path(url, size)
        if not path.is_file():
            self._fetch(path, url, size)

    def _path(self, url: str, size: int) -> Path:
        return self.folder / "shards" / f"{hash_json([url, size])}-{url.rpartition('/')[2]}"

    def _fetch(self, path: Path, url: str, size: int) -> Future[None]:
        with _lock:
            if path not in _under_way:
                _under_way[path] = _FETCHERS.submit(self._make, path, url, size)
            return _under_way[path]

    def _make(self, path: Path, url: str, size: int) -> None:
        try:
            fs, source = storage.filesystem(url)
            storage.download(fs, source, path, size)
            self._evict(path)
        finally:
            with _lock:
                del _under_way[path]

    def _evict(self, newest: Path) -> None:
        copies = []
        for path in newest.parent.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts as well
                copies.append((path == newest, path.stat().st_atime_ns, path.stat().st_size, path))
        total = sum(size for _, _, size, _ in copies)
        for is_newest, _, size, path in sorted(copies):
            if total <= self.limit_bytes or is_newest:
                return
            path.unlink(missing_ok=True)
            total -= size
