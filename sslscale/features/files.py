"""Large files that appear whole or not at all, here and on the store of a run that lies at a URL."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sslscale import storage


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written by the block; synced and renamed onto `path` when it ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    storage.publish(path)


def write_npy(path: Path, array: np.ndarray) -> None:
    """`np.save`, atomically and C-contiguous, so that the file can be memory-mapped."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


def open_npy(path: Path) -> np.ndarray:
    """The array of a file, memory-mapped read-only."""
    return np.load(storage.bring(path), mmap_mode="r", allow_pickle=False)


def allow_open_files() -> None:
    """Lets this process have as many files open as it may: a mapped file counts as one for as long as it is used."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
