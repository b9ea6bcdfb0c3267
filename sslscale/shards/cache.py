"""Copies of remote shards on this machine: within a size, and fetched before they are asked for."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from sslscale import storage
from sslscale.config import RunConfig
from sslscale.rundir import hash_json

_TEMPORARY = ".*.tmp"  # as storage.download names what is not whole yet
_FETCHERS = 2
_lock = threading.Lock()
_under_way: dict[Path, Future[None]] = {}
_wanted: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()


class RemoteShard(NamedTuple):
    """One content of a shard at a URL: the one of this hash, or where that is unknown what the store calls `version`.

    Shards that were packed again are often of the same size: a tar is padded to a multiple of 10,240 bytes.
    """

    url: str
    bytes: int
    sha256: str | None
    version: str | None


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

    def copy(self, shard: RemoteShard) -> Path:
        """The copy of a remote shard; waits where it is being fetched.

        Raises StageError where what arrives is not as long as the shard, or has another hash.
        """
        path = self._path(shard)
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now
        except FileNotFoundError:
            self._fetch(path, shard).result()
        return path

    def holds(self, shard: RemoteShard) -> bool:
        """Whether there is a copy."""
        return self._path(shard).is_file()

    def read_ahead(self, shard: RemoteShard) -> None:
        """Begins to fetch a shard; a failure is met again by who asks for it."""
        if not self.holds(shard):
            self._fetch(self._path(shard), shard)

    def _path(self, shard: RemoteShard) -> Path:
        content = hash_json([shard.url, shard.bytes, shard.sha256 or shard.version])
        return self.folder / "shards" / f"{content}-{shard.url.rpartition('/')[2]}"

    def _fetch(self, path: Path, shard: RemoteShard) -> Future[None]:
        with _lock:
            if path not in _under_way:
                _under_way[path] = _in_background(partial(self._make, path, shard))
            return _under_way[path]

    def _make(self, path: Path, shard: RemoteShard) -> None:
        try:
            fs, source = storage.filesystem(shard.url)
            storage.download(fs, source, path, shard.bytes, shard.sha256)
            self._evict(path)
        finally:
            with _lock:
                del _under_way[path]

    def _evict(self, newest: Path) -> None:
        for path in newest.parent.glob(_TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > storage.ARRIVING_SECONDS:  # of a process that was killed
                    path.unlink()
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


def _in_background(work: Callable[[], None]) -> Future[None]:
    """The result of `work`, which one of a few threads will do; a process that ends waits for none of them."""
    _start_fetchers(os.getpid())
    found: Future[None] = Future()
    _wanted.put((found, work))
    return found


@cache
def _start_fetchers(process: int) -> None:
    for number in range(_FETCHERS):
        threading.Thread(target=_fetch_wanted, name=f"sslscale-read-ahead-{number}", daemon=True).start()


def _fetch_wanted() -> None:
    while True:
        found, work = _wanted.get()
        try:
            found.set_result(work())
        except BaseException as error:  # carried to who waits for it
            found.set_exception(error)
