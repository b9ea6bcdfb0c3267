"""A dataset: tar shards at a URL, and what they hold.

A folder of shards has a `shards.json`: `{"format_version": 1, "shards": [{"name", "samples", "bytes", "sha256"}]}`.
Where it is missing, one pass over the headers makes it.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from sslscale import storage
from sslscale.errors import UserError
from sslscale.rundir import hash_json, write_json
from sslscale.shards.cache import ShardCache
from sslscale.shards.filtered import FilteredShard
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
    excluded: tuple[int, ...] = ()
    """Records that are left out: see filtered.py."""

    @property
    def kept(self) -> int:
        return self.samples - len(self.excluded)

    def without(self, records: Iterable[int]) -> ShardInfo:
        """This shard with more left out; `records` are numbered as a reader sees them, and the URL made absolute."""
        left = np.setdiff1d(np.arange(self.samples), self.excluded)
        excluded = sorted({*self.excluded, *left[list(records)].tolist()})
        url = self.url if "://" in self.url else str(Path(self.url).expanduser().absolute())
        return replace(self, url=url, excluded=tuple(excluded))


@dataclass(frozen=True)
class ShardSet:
    """Shards in order. A sample's global id is `offsets[shard] + record`."""

    url: str
    shards: Sequence[ShardInfo]
    cache: ShardCache | None = None
    limit: int | None = None
    """Only the first so many samples count; None is all of them."""
    _open: weakref.WeakValueDictionary[int, TarShard | FilteredShard] = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay in their process
        return ShardSet, (self.url, self.shards, self.cache, self.limit)

    @cached_property
    def counts(self) -> np.ndarray:
        """Samples that each shard promises, as far as `limit` goes: int64 (shards,)."""
        promised = np.array([info.kept for info in self.shards], dtype=np.int64)
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

    @property
    def num_excluded(self) -> int:
        return sum(len(info.excluded) for info in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' names, samples, bytes, sha256 and left-out records: the dataset, wherever it lies."""
        shards = [
            [info.name, info.samples, info.bytes, info.sha256, *([info.excluded] if info.excluded else [])]
            for info in self.shards
        ]
        return hash_json(shards if self.limit is None else [self.limit, *shards])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and records, both int64 (n,), of global ids (n,)."""
        shards = np.searchsorted(self.offsets + self.counts, ids, side="right")
        return shards, ids - self.offsets[shards]

    def local_path(self, info: ShardInfo) -> Path:
        """Where the shard lies on this machine. A remote one is copied into the cache on first use."""
        return _local_path(info.url, info.bytes, self.cache)

    def read_ahead(self, shard: int) -> None:
        """Begins to copy a remote shard, for `open` to find it there."""
        info = self.shards[shard]
        if self.cache is not None and _is_remote(info.url):
            self.cache.read_ahead(info.url, info.bytes)

    def open(self, shard: int) -> TarShard | FilteredShard:
        """The shard's records; shared while anyone holds it. Raises UserError where shards.json is out of date."""
        tar = self._open.get(shard)
        if tar is None:
            info = self.shards[shard]
            again = partial(self.local_path, info) if _is_remote(info.url) else None
            whole = TarShard(self.local_path(info), info.url, again)
            if len(whole) > info.samples:
                raise UserError(
                    f"{INDEX} is out of date",
                    got=f"{info.url} holds {len(whole)} samples, {INDEX} says {info.samples}",
                    fix=f"delete {INDEX}: it is made again on the next use",
                )
            tar = FilteredShard(whole, info.excluded) if info.excluded else whole
            self._open[shard] = tar
        return tar


def open_shards(url: str, cache: ShardCache | None = None, limit: int | None = None) -> ShardSet:
    """The shards in a folder, a single tar, a brace range `shard-{000..009}.tar`, or a filtered list (.json).

    All of them are a path or any fsspec URL.

    `cache` is for copies of remote shards, and for the shards.json of a folder that cannot be written;
    `limit` uses the first so many samples only.
    Raises UserError for a `pipe:` URL, a missing folder, no shards, and a shards.json that does not match the folder.
    """
    if url.endswith(".json"):
        return ShardSet(url, _read_filtered(url), cache, limit)
    folder, names = _parse(url)
    fs, path = storage.filesystem(str(Path(folder).expanduser()) if "://" not in folder else folder)
    known = _read_index(fs, path)
    if names is None:
        sizes = _list_folder(fs, path, url, known)
        if known is not None and (missing := known.keys() - sizes.keys()):
            raise UserError(
                f"{INDEX} does not match the shards beside it",
                got=f"{url} has no {_first(missing)}",
                fix=f"restore the missing shards, or delete {INDEX}: it is made again on the next use",
            )
    else:
        sizes = {name: _size(fs, f"{path}/{name}", url) for name in names}
    known = {name: entry for name, entry in (known or {}).items() if not _is_stale(entry, sizes.get(name))}
    if not known.keys() >= sizes.keys():
        beside = Path(path) if names is None and _is_local(fs) else None
        known = _make_index(folder, sizes, known, cache, beside)
    entries = {name: {**known[name], "bytes": size} for name, size in sizes.items()}  # as it is, not as promised
    shards = tuple(ShardInfo(name=name, url=f"{folder}/{name}", **entry) for name, entry in entries.items())
    return ShardSet(url, shards, cache, limit)


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


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def _list_folder(fs: fsspec.AbstractFileSystem, path: str, url: str, known: Mapping[str, Any] | None) -> dict[str, int]:
    """Name -> bytes of the tars in a folder, by name."""
    if known is not None and "http" in fs.protocol:  # web servers need not list their folders: shards.json does
        return {name: entry["bytes"] for name, entry in known.items()}
    try:
        entries = storage.retrying(fs.ls, path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("the folder of shards does not exist", got=url) from None
    found = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}
    sizes = {name: size for name, size in found.items() if name.endswith(".tar") and not name.startswith(".")}
    if not sizes:
        raise UserError("there are no shards here", got=url, allowed="*.tar", fix="sslscale pack makes them")
    return dict(sorted(sizes.items()))


def _size(fs: fsspec.AbstractFileSystem, path: str, url: str) -> int:
    try:
        return storage.retrying(fs.size, path)
    except FileNotFoundError:
        raise UserError("a shard does not exist", got=f"{path} of {url}") from None


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith(("file://", "local://"))


def _local_path(url: str, size: int, cache: ShardCache | None) -> Path:
    """The file itself, or its copy in the cache."""
    if not _is_remote(url):
        return Path(url.rpartition("://")[2]).expanduser()
    if cache is None:
        raise UserError("remote shards need a cache folder for their copies", got=url)
    return cache.copy(url, size)


# ------------------------------------------------------------------ shards.json


def _read_index(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]] | None:
    """Name -> samples, bytes and sha256; None where there is no shards.json."""
    try:
        text = storage.retrying(fs.cat_file, f"{path}/{INDEX}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _check_index(text, f"{path}/{INDEX}")


def write_filtered(path: Path, shards: Iterable[ShardInfo]) -> None:
    """Writes a filtered list: see filtered.py."""
    write_json(path, {"format_version": FORMAT_VERSION, "shards": [vars(info) for info in shards]})


def _read_filtered(url: str) -> tuple[ShardInfo, ...]:
    fs, path = storage.filesystem(url if "://" in url else str(Path(url).expanduser()))
    try:
        listed = json.loads(storage.retrying(fs.cat_file, path))["shards"]
        return tuple(ShardInfo(**{**info, "excluded": tuple(info["excluded"])}) for info in listed)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("the list of shards does not exist", got=url) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the list of shards cannot be read", got=f"{url}: {error!r}", fix="sslscale dedup") from None


def _is_stale(entry: Mapping[str, Any], size: int | None) -> bool:
    """Whether we counted what the shard held, and it has changed since; who wrote a hash has promised its samples."""
    return entry["sha256"] is None and size not in (None, entry["bytes"])


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
    folder: str,
    sizes: Mapping[str, int],
    known: Mapping[str, dict[str, Any]],
    cache: ShardCache | None,
    beside: Path | None,
) -> dict[str, dict[str, Any]]:
    """One pass over the headers of the shards that are not `known`, kept in shards.json beside them, or in the cache.

    What a damaged shard has lost cannot be counted here: it counts as one sample, which then fails.
    """
    kept = cache.folder / "indexes" / f"{hash_json([folder, sizes])}.json" if cache else None
    if kept is not None and kept.is_file():
        return _check_index(kept.read_bytes(), str(kept))
    shards: list[dict[str, Any]] = []
    for name, size in sizes.items():
        if name in known:
            shards.append({"name": name, **known[name]})
            continue
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
