"""A dataset: tar shards at a URL, and what they hold.

A folder of shards has a `shards.json`: `{"format_version": 1, "shards": [{"name", "samples", "bytes", "sha256"}]}`.
Where it is missing, one pass over the headers makes it.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sslscale.errors import StageError, UserError
from sslscale.rundir import hash_json, write_json
from sslscale.shards.tar import TarShard

FORMAT_VERSION = 1
INDEX = "shards.json"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as shards.json describes it: `samples` is what it promises to hold. `sha256` may be unknown."""

    name: str
    url: str
    samples: int
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class ShardSet:
    """Shards in order. A sample's global id is `offsets[shard] + record`."""

    url: str
    shards: Sequence[ShardInfo]
    cache: Path | None = None
    limit: int | None = None
    """Only the first so many samples count; None is all of them."""
    _open: weakref.WeakValueDictionary[int, TarShard] = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay in their process
        return ShardSet, (self.url, self.shards, self.cache, self.limit)

    @cached_property
    def counts(self) -> np.ndarray:
        """Samples that each shard promises, as far as `limit` goes: int64 (shards,)."""
        promised = np.array([info.samples for info in self.shards], dtype=np.int64)
        if self.limit is None:
            return promised
        return np.clip(self.limit - (np.cumsum(promised) - promised), 0, promised)

    @cached_property
    def offsets(self) -> np.ndarray:
        """The global id of each shard's first sample: int64 (shards,)."""
        return np.cumsum(self.counts) - self.counts

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' names, samples, bytes and sha256: the dataset's identity, wherever it lies."""
        shards = [[info.name, info.samples, info.bytes, info.sha256] for info in self.shards]
        return hash_json(shards if self.limit is None else [self.limit, *shards])

    def local_path(self, info: ShardInfo) -> Path:
        """Where the shard lies on this machine. A remote one is copied into the cache on first use."""
        return _local_path(info.url, info.bytes, self.cache)

    def open(self, shard: int) -> TarShard:
        """The shard's records; shared while anyone holds it. Raises UserError where shards.json is out of date."""
        tar = self._open.get(shard)
        if tar is None:
            info = self.shards[shard]
            tar = TarShard(self.local_path(info), info.url)
            if len(tar) > info.samples:
                raise UserError(
                    f"{INDEX} is out of date",
                    got=f"{info.url} holds {len(tar)} samples, {INDEX} says {info.samples}",
                    fix=f"delete {INDEX}: it is made again on the next use",
                )
            self._open[shard] = tar
        return tar


def open_shards(url: str, cache: Path | None = None, limit: int | None = None) -> ShardSet:
    """The shards in a folder, a single tar, or a brace range `shard-{000..009}.tar`; a path or any fsspec URL.

    `cache` is a folder for copies of remote shards, and for the shards.json of a folder that cannot be written;
    `limit` uses the first so many samples only.
    Raises UserError for a `pipe:` URL, a missing folder, no shards, and a shards.json that does not match the folder.
    """
    folder, names = _parse(url)
    fs, path = _filesystem(folder)
    known = _read_index(fs, path)
    if names is None:
        sizes = _list_folder(fs, path, url, known)
        if known is not None and known.keys() != sizes.keys():
            raise UserError(
                f"{INDEX} does not match the shards beside it",
                got=f"{url}: {_first(known.keys() ^ sizes.keys())} are only in one of the two",
                fix=f"restore the missing shards, or delete {INDEX}: it is made again on the next use",
            )
    else:
        sizes = {name: _size(fs, f"{path}/{name}", url) for name in names}
    if known is None or not known.keys() >= sizes.keys():
        known = _make_index(folder, sizes, cache, beside=Path(path) if names is None and _is_local(fs) else None)
    return ShardSet(
        url, tuple(ShardInfo(name=name, url=f"{folder}/{name}", **known[name]) for name in sizes), cache, limit
    )


def write_index(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Writes shards.json; `shards` are records of name, samples, bytes and sha256."""
    write_json(folder / INDEX, {"format_version": FORMAT_VERSION, "shards": shards})


# ------------------------------------------------------------------ locations


def _parse(url: str) -> tuple[str, list[str] | None]:
    """The folder, and the names of the shards where they are given."""
    if "pipe:" in url:
        raise UserError("pipe: URLs run a shell command and are refused", got=url, allowed="a path or an fsspec URL")
    try:
        urls = list(braceexpand(url))
    except ValueError as error:
        raise UserError("a brace range cannot be read", got=f"{url}: {error}", allowed="shard-{000..009}.tar") from None
    if len(urls) == 1 and not urls[0].endswith(".tar"):
        return urls[0].rstrip("/") or "/", None
    folders = {one.rpartition("/")[0] for one in urls}
    if len(folders) > 1:
        raise UserError("the shards of one dataset lie in one folder", got=url, fix="name one dataset for each folder")
    return folders.pop() or ".", [one.rpartition("/")[2] for one in urls]


def _filesystem(folder: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, path = url_to_fs(str(Path(folder).expanduser()) if "://" not in folder else folder)
    except (ImportError, ValueError) as error:  # the protocol's package is missing, or there is no such protocol
        raise UserError("this location cannot be opened", got=f"{folder}: {error}") from None
    return fs, path


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def _list_folder(fs: fsspec.AbstractFileSystem, path: str, url: str, known: Mapping[str, Any] | None) -> dict[str, int]:
    """Name -> bytes of the tars in a folder, by name."""
    if known is not None and "http" in fs.protocol:  # web servers need not list their folders: shards.json does
        return {name: entry["bytes"] for name, entry in known.items()}
    try:
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("the folder of shards does not exist", got=url) from None
    found = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}
    sizes = {name: size for name, size in found.items() if name.endswith(".tar") and not name.startswith(".")}
    if not sizes:
        raise UserError("there are no shards here", got=url, allowed="*.tar", fix="sslscale pack makes them")
    return dict(sorted(sizes.items()))


def _size(fs: fsspec.AbstractFileSystem, path: str, url: str) -> int:
    try:
        return fs.size(path)
    except FileNotFoundError:
        raise UserError("a shard does not exist", got=f"{path} of {url}") from None


def _local_path(url: str, size: int, cache: Path | None) -> Path:
    """The file itself, or its copy in the cache, made under another name and then renamed."""
    fs, path = _filesystem(url)
    if _is_local(fs):
        return Path(path)
    if cache is None:
        raise UserError("remote shards need a cache folder for their copies", got=url)
    copy = cache / "shards" / f"{hash_json([url, size])}-{url.rpartition('/')[2]}"
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            fs.get_file(path, str(partial))
            if partial.stat().st_size != (there := fs.size(path)) and there is not None:
                raise StageError(
                    "a shard's copy is not complete", got=f"{url}: {partial.stat().st_size} of {there} bytes"
                )
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)
    return copy


# ------------------------------------------------------------------ shards.json


def _read_index(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]] | None:
    """Name -> samples, bytes and sha256; None where there is no shards.json."""
    try:
        text = fs.cat_file(f"{path}/{INDEX}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _check_index(text, f"{path}/{INDEX}")


def _check_index(text: bytes, where: str) -> dict[str, dict[str, Any]]:
    try:
        index = json.loads(text)
        version, shards = index["format_version"], index["shards"]
        entries = {s["name"]: {"samples": s["samples"], "bytes": s["bytes"], "sha256": s.get("sha256")} for s in shards}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{INDEX} cannot be read", got=f"{where}: {error!r}", fix="delete it: it is made again"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"{INDEX} has an unknown format", got=f"{where}: {version}", allowed=FORMAT_VERSION)
    return entries


def _make_index(
    folder: str, sizes: Mapping[str, int], cache: Path | None, beside: Path | None
) -> dict[str, dict[str, Any]]:
    """One pass over the headers of every shard, kept in shards.json beside them, or else in the cache.

    What a damaged shard has lost cannot be counted here: it counts as one sample, which then fails.
    """
    kept = cache / "indexes" / f"{hash_json([folder, sizes])}.json" if cache else None
    if kept is not None and kept.is_file():
        return _check_index(kept.read_bytes(), str(kept))
    shards: list[dict[str, Any]] = []
    for name, size in sizes.items():
        tar = TarShard(_local_path(f"{folder}/{name}", size, cache))
        shards.append({"name": name, "samples": len(tar) + (tar.damage is not None), "bytes": size, "sha256": None})
    if beside is not None and os.access(beside, os.W_OK):
        write_index(beside, shards)
    elif kept is not None:
        write_json(kept, {"format_version": FORMAT_VERSION, "shards": shards})
    return {shard.pop("name"): shard for shard in shards}


def _first(names: Iterable[str], count: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")
