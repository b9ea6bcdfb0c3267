"""Where shards lie, and what a store says of them without being asked for their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from sslscale import storage
from sslscale.errors import UserError

# The first of these that a store knows; a hash of the content before a time, which a copy does not keep.
_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "md5Hash"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)


class Stored(NamedTuple):
    """A file as its store describes it. `version` is another after it was written again; None where none is told."""

    bytes: int
    version: str | None


def parse_location(url: str) -> tuple[str, list[str] | None]:
    """The folder, and the names of the shards where they are given. Raises UserError for what names no shards."""
    if "pipe:" in url:
        raise UserError("pipe: URLs run a shell command and are refused", got=url, allowed="a path or an fsspec URL")
    try:
        urls = list(braceexpand(url))
    except ValueError as error:
        raise UserError("a brace range cannot be read", got=f"{url}: {error}", allowed="shard-{000..009}.tar") from None
    if len(urls) == 1 and not urls[0].endswith(".tar"):
        return urls[0].rstrip("/") or "/", None
    others = [one for one in urls if not one.endswith(".tar")]
    if others:
        raise UserError(
            "a brace range names shards, not folders",
            got=f"{url}, of which {others[0]}",
            allowed="shard-{000..009}.tar",
        )
    folders = {one.rpartition("/")[0] for one in urls}
    if len(folders) > 1:
        raise UserError("the shards of one dataset lie in one folder", got=url, fix="name one dataset for each folder")
    return folders.pop() or ".", [one.rpartition("/")[2] for one in urls]


def open_location(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path in it."""
    return storage.filesystem(url if "://" in url else str(Path(url).expanduser()))


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith(("file://", "local://"))


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def list_folder(
    fs: fsspec.AbstractFileSystem, path: str, url: str, known: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Stored]:
    """Name -> what is stored, of the tars in a folder, by name; `known` is its shards.json, where it has one."""
    if known is not None and "http" in fs.protocol:  # web servers need not list their folders: shards.json does
        hashed = {name: Stored(entry["bytes"], None) for name, entry in known.items() if entry["sha256"] is not None}
        return {name: hashed.get(name) or look(fs, f"{path}/{name}", url) for name in known}
    try:
        entries = storage.retrying(fs.ls, path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("the folder of shards does not exist", got=url) from None
    found = {entry["name"].rpartition("/")[2]: _stored(entry) for entry in entries}
    stored = {name: one for name, one in found.items() if name.endswith(".tar") and not name.startswith(".")}
    if not stored:
        raise UserError("there are no shards here", got=url, allowed="*.tar", fix="sslscale pack makes them")
    return dict(sorted(stored.items()))


def look(fs: fsspec.AbstractFileSystem, path: str, url: str) -> Stored:
    """What is stored at one path. Raises UserError where there is nothing."""
    try:
        return _stored(storage.retrying(fs.info, path))
    except FileNotFoundError:
        raise UserError("a shard does not exist", got=f"{path} of {url}") from None


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first of many names, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


def _stored(info: Mapping[str, Any]) -> Stored:
    name = next((name for name in _VERSIONS if info.get(name)), None)
    if name is None:
        return Stored(info["size"], None)
    value = info[name].timestamp() if isinstance(info[name], datetime) else info[name]
    return Stored(info["size"], f"{name}:{value:.6f}" if isinstance(value, float) else f"{name}:{value}")
