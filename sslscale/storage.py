"""Files of a run that lies at a URL: a working copy on this machine, and the remote that is the truth.

Whatever reads and writes a run works on local paths: features are memory-mapped, DeepSpeed and faiss know nothing else.
The path of a working copy says which URL it is of, so it also does in a process on another node that is handed it:

    s3://bucket/runs/a/embed/train/part-00000.npy
    <temporary folder>/sslscale-remote/s3/bucket/runs/a/embed/train/part-00000.npy

A file is published when it is renamed into place. A marker is written after what it stands for, so it is uploaded after
it, too: no order has to be kept twice. A file of the working copy is the remote's when it has its size and its time
(rsync's rule); each process asks once a file. For a path that is of no URL, every function here does what its name
says to the local file, or nothing. Every request goes through `retrying`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sslscale.errors import StageError, UserError, missing_package
from sslscale.retry import count_retries as count_retries
from sslscale.retry import retries as retries
from sslscale.retry import retrying as retrying

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ARRIVING_SECONDS = 3600.0  # after which a copy that does not grow is a dead process's
CHUNK_BYTES = 32 * 2**20  # what a broken connection costs at most
_MARK, _NO_HOST = "sslscale-remote", "="

# What grows with the data is brought when it is read; what is of this machine, or of Ray, is never copied.
_LAZY_NAMES = (
    "part-*.npy",
    "part-*.parquet",
    "ids.npy",
    "rows*.npy",
    "shard-*.npy",
    "order-*.npy",
    "starts-*.npy",
    "sorted-*.npy",
    "*.tar",
    "*.faiss",
)
_LAZY_FOLDERS = ("/pretrain/checkpoints/", "/pretrain/tensorboard/")
_NEVER = frozenset((".cache", ".lease", ".ray"))

# Our own requests are the ones that are counted, so the libraries' silent ones are turned off.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
}
_EXTRAS = {"s3": "s3"}

_known: dict[Path, int] = {}  # files that this process has compared with the remote -> their time then
_polled: dict[Path, float] = {}


# ------------------------------------------------------------------ paths and filesystems


def local_path(location: str | Path, copy: str = "") -> Path:
    """The folder that `location` is worked on in: a path itself, the working copy of a URL, or another of that name."""
    protocol, mark, rest = str(location).partition("://")
    if not mark or protocol in ("file", "local"):
        return Path(rest if mark else protocol).expanduser().absolute()
    if rest.startswith("/"):  # a URL that names no host
        rest = _NO_HOST + rest
    folder = f"sslscale-{os.getuid()}" if hasattr(os, "getuid") else "sslscale"
    return Path(tempfile.gettempdir(), folder, copy, _MARK, protocol, *PurePosixPath("/" + rest).parts[1:])


def remote_url(path: Path) -> str | None:
    """The URL that a path inside a working copy is of; None for any other path."""
    if _MARK not in path.parts:
        return None
    protocol, *rest = path.parts[path.parts.index(_MARK) + 1 :]
    return f"{protocol}://{'/'.join(rest).removeprefix(_NO_HOST)}"


def shown(path: Path) -> str:
    """How a user knows this path."""
    return remote_url(path) or str(path)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's filesystem and the path in it. UserError where the protocol's package is missing, or unknown."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        fs, path = url_to_fs(url, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        if protocol in _EXTRAS:
            raise missing_package(f"{protocol}fs", _EXTRAS[protocol]) from None
        raise UserError("this location cannot be opened", got=f"{url}: {error}") from None
    except ValueError as error:
        raise UserError("this location cannot be opened", got=f"{url}: {error}") from None
    if protocol == "s3":
        fs.retries = 1
    return fs, path


# ------------------------------------------------------------------ from here to the remote


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file, here and there, so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    publish(path)


def publish(path: Path) -> None:
    """Uploads a file that is now in its place."""
    url = remote_url(path)
    if url is None:
        return
    fs, target = filesystem(url)
    retrying(fs.put_file, str(path), target)
    _adopt(path, retrying(fs.info, target))


def publish_tree(folder: Path) -> None:
    """Uploads every file below a folder that is not hidden, and not there yet."""
    if remote_url(folder) is not None:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not _is_known(file) and not _hidden(file.relative_to(folder)):
                publish(file)


def move_out(path: Path) -> None:
    """Publishes a file that this machine has no further use for: its working copy goes."""
    if remote_url(path) is not None:
        publish(path)
        path.unlink()


def create(path: Path, data: bytes) -> bool:
    """Writes a file that must not exist: False where it does. Of many who try at once, one succeeds."""
    url = remote_url(path)
    if url is None:
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True
    fs, target = filesystem(url)
    try:
        retrying(fs.pipe_file, target, data, mode="create")
    except FileExistsError:
        return retrying(fs.cat_file, target) == data  # ours, where the answer to an earlier attempt was lost
    return True


def remove(path: Path) -> None:
    """Deletes a file, here and there; one that does not exist is fine."""
    path.unlink(missing_ok=True)
    url = remote_url(path)
    if url is not None:
        fs, target = filesystem(url)
        with contextlib.suppress(FileNotFoundError):
            retrying(fs.rm_file, target)


def remove_remote_tree(folder: Path) -> None:
    """Deletes all that the remote has below a folder, what names the others first: it never looks half there."""
    if remote_url(folder) is None:
        return
    fs, entries = _find(folder)
    for path in sorted(entries, key=lambda path: (path.suffix != ".json", len(path.parts))):
        with contextlib.suppress(FileNotFoundError):
            retrying(fs.rm_file, entries[path]["name"])


# ------------------------------------------------------------------ from the remote to here


def download(
    fs: AbstractFileSystem, source: str, target: Path, size: int | None = None, sha256: str | None = None
) -> None:
    """Copies a remote file to `target`, under another name first.

    Raises StageError where it is not `size` bytes long, or has another hash than `sha256`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    found = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for start, stop in _ranges(fs, source, size):
                data = retrying(fs.cat_file, source, start=start, end=stop)
                file.write(data)
                if sha256 is not None:
                    found.update(data)
        if size is not None and partial.stat().st_size != size:
            raise StageError(
                "a copy of a remote file is not complete", got=f"{source}: {partial.stat().st_size} of {size} bytes"
            )
        if sha256 not in (None, found.hexdigest()):
            raise StageError(
                "a remote file is not the one that was listed",
                got=f"{source}: sha256 {found.hexdigest()}",
                allowed=sha256,
                fix="restore the file, or make the list of hashes beside it again",
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _ranges(fs: AbstractFileSystem, source: str, size: int | None) -> Iterator[tuple[int | None, int | None]]:
    """The pieces that a file is asked for; one piece of a server that cannot cut."""
    if not size or size <= CHUNK_BYTES or ("http" in fs.protocol and not retrying(fs.info, source).get("partial")):
        yield None, None
        return
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(start + CHUNK_BYTES, size)


def bring(path: Path) -> Path:
    """The file as the remote has it, fetched where it is missing or another here; none where the remote has none."""
    if remote_url(path) is not None and not _is_known(path):
        refresh(path)
    return path


def refresh(path: Path) -> Path:
    """`bring`, for a file that changes: the remote is asked every time."""
    url = remote_url(path)
    if url is not None:
        fs, source = filesystem(url)
        try:
            info = retrying(fs.info, source)
        except FileNotFoundError:
            info = {"type": "nothing"}
        if info["type"] == "file":
            _fetch(fs, path, info)
        elif path.is_file():
            path.unlink()
    return path


def appeared(path: Path, every: float = 5.0) -> bool:
    """Whether a file exists, for a loop that waits for it: a remote is asked at most once in `every` seconds.

    The working copy stays as it is: another thread may be writing the file that the remote has not yet.
    """
    if path.exists():
        return True
    if remote_url(path) is None or time.monotonic() - _polled.get(path, -every) < every:
        return False
    _polled[path] = time.monotonic()
    return size(path) is not None


def bring_tree(folder: Path) -> Path:
    """Every file that the remote has below a folder."""
    if remote_url(folder) is not None:
        fs, entries = _find(folder)
        for path, info in entries.items():
            _fetch(fs, path, info)
    return folder


def pull(folder: Path) -> None:
    """Makes the working copy what the remote is: small files are fetched, those that the remote has not are deleted.

    Files that grow with the data stay where they are until `bring` asks for them.
    """
    if remote_url(folder) is None:
        return
    fs, entries = _find(folder)
    for path, info in entries.items():
        if not _lazy(path):
            _fetch(fs, path, info)
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        if path in entries or _NEVER & set(path.relative_to(folder).parts):
            continue
        with contextlib.suppress(FileNotFoundError):  # another reader does the same
            arriving = path.suffix == ".tmp" and time.time() - path.stat().st_mtime < ARRIVING_SECONDS
            if path.is_file() and not arriving:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def names(folder: Path) -> list[str]:
    """The names of the files directly in a folder, sorted; none where there is no such folder."""
    url = remote_url(folder)
    if url is None:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    fs, target = filesystem(url)
    try:
        found = {entry.rstrip("/") for entry in retrying(fs.ls, target, detail=False)} - {target.rstrip("/")}
        return sorted(entry.rpartition("/")[2] for entry in found)
    except FileNotFoundError:
        return []


def sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files directly in a folder; none where there is no such folder."""
    url = remote_url(folder)
    if url is None:
        files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        return {path.name: path.stat().st_size for path in files}
    fs, target = filesystem(url)
    try:
        entries = retrying(fs.ls, target, detail=True)
    except FileNotFoundError:
        return {}
    found = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}
    return {name: size for name, size in found.items() if name}  # some clients write the folder itself, too


def size(path: Path) -> int | None:
    """Bytes of a file, wherever it lies; None where there is none."""
    url = remote_url(path)
    if url is None:
        return path.stat().st_size if path.is_file() else None
    fs, target = filesystem(url)
    try:
        return int(retrying(fs.info, target)["size"])
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------ which version a file is


def _find(folder: Path) -> tuple[AbstractFileSystem, dict[Path, dict[str, Any]]]:
    """Local path -> fsspec's info, of all files that the remote has below a folder and that are ever copied."""
    url = remote_url(folder)
    assert url is not None
    fs, root = filesystem(url)
    listed = retrying(fs.find, root, detail=True)
    found = {name: info for name, info in listed.items() if not name.endswith("/")}  # some clients write folders, too
    entries = {folder / PurePosixPath(name).relative_to(PurePosixPath(root)): info for name, info in found.items()}
    return fs, {path: info for path, info in entries.items() if not _NEVER & set(path.relative_to(folder).parts)}


def _lazy(path: Path) -> bool:
    return any(part in path.as_posix() for part in _LAZY_FOLDERS) or any(map(path.match, _LAZY_NAMES))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _fetch(fs: AbstractFileSystem, path: Path, info: Mapping[str, Any]) -> None:
    here = path.stat() if path.is_file() else None
    if here is None or (here.st_size, here.st_mtime_ns) != (info["size"], _time(info)):
        download(fs, info["name"], path, info["size"])
    _adopt(path, info)


def _adopt(path: Path, info: Mapping[str, Any]) -> None:
    """Marks a file as the remote's version."""
    os.utime(path, ns=(time.time_ns(), _time(info)))
    _known[path] = _time(info)


def _is_known(path: Path) -> bool:
    return path.is_file() and _known.get(path) == path.stat().st_mtime_ns


def _time(info: Mapping[str, Any]) -> int:
    """When the remote's version was written, in nanoseconds; whole seconds, which is all that S3 says of one file."""
    fields = ("LastModified", "last_modified", "mtime", "updated", "created")
    found = next(info[name] for name in fields if name in info)
    moment = datetime.fromisoformat(found) if isinstance(found, str) else found
    return int(moment.timestamp() if isinstance(moment, datetime) else moment) * 10**9
