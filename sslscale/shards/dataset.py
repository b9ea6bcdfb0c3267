"""A dataset: tar shards at a URL, and what they hold.

A folder of shards has a `shards.json`: `{"format_version": 1, "shards": [{"name", "samples", "bytes", "sha256"}]}`.
Where it is missing, one pass over the headers makes it. It knows no hashes then, but of each shard what the headers
tell, `layout`, and what the store calls the shard's content, `version`: where that is another, the shard is read again.
"""

from __future__ import annotations

import itertools
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

from sslscale import storage
from sslscale.errors import UserError
from sslscale.rundir import hash_json, write_json
from sslscale.shards.cache import RemoteShard, ShardCache
from sslscale.shards.filtered import FilteredShard
from sslscale.shards.location import (
    Stored,
    first_names,
    is_local,
    is_remote,
    list_folder,
    look,
    open_location,
    parse_location,
)
from sslscale.shards.tar import TarShard

FORMAT_VERSION = 1
INDEX = "shards.json"
_ALWAYS = ("samples", "bytes")
_FIELDS = (*_ALWAYS, "sha256", "layout", "version")  # of a shard in it, beside the name


@dataclass(frozen=True)
class ShardInfo:
    """One shard as shards.json describes it: `samples` is what it promises to hold; `bytes` is as it is now."""

    name: str
    url: str
    samples: int
    bytes: int
    sha256: str | None = None
    excluded: tuple[int, ...] = ()
    """Records that are left out: see filtered.py."""
    layout: str | None = None
    """Of its headers (TarShard.layout), where no hash is known."""
    version: str | None = None
    """What its store calls its content as it is now."""
    cut: bool = False
    """Whether it has not the size that `sha256` was taken of: the samples that it lost are counted one by one."""

    @property
    def content(self) -> str | None:
        """What tells it from another of its size, wherever it lies; None of an index that knows neither."""
        return self.sha256 or (f"layout:{self.layout}" if self.layout else None)

    def is_other(self, now: ShardInfo) -> bool:
        """Whether `now` is another content, as far as both say."""
        hashes = (self.sha256, now.sha256) if self.sha256 and now.sha256 else (self.layout, now.layout)
        return self.bytes != now.bytes or (None not in hashes and hashes[0] != hashes[1])

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
    index: str | None = None
    """The file that says what the shards hold, where a next use makes it again."""
    _open: weakref.WeakValueDictionary[int, TarShard | FilteredShard] = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay in their process
        return ShardSet, (self.url, self.shards, self.cache, self.limit, self.index)

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
        """A hash of the shards' names, samples, bytes, content and left-out records: the dataset, wherever it lies."""
        shards = [
            [info.name, info.samples, info.bytes, info.content, *([info.excluded] if info.excluded else [])]
            for info in self.shards
        ]
        return hash_json(shards if self.limit is None else [self.limit, *shards])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and records, both int64 (n,), of global ids (n,)."""
        shards = np.searchsorted(self.offsets + self.counts, ids, side="right")
        return shards, ids - self.offsets[shards]

    def local_path(self, info: ShardInfo) -> Path:
        """Where the shard lies on this machine. A remote one is copied into the cache on first use."""
        return _local_path(_remote_shard(info), self.cache) if is_remote(info.url) else _as_path(info.url)

    def is_here(self, shard: int) -> bool:
        """Whether `open` finds the shard on this machine, and need not copy it."""
        info = self.shards[shard]
        return not is_remote(info.url) or (self.cache is not None and self.cache.holds(_remote_shard(info)))

    def read_ahead(self, shard: int) -> None:
        """Begins to copy a remote shard, for `open` to find it there."""
        info = self.shards[shard]
        if self.cache is not None and is_remote(info.url):
            self.cache.read_ahead(_remote_shard(info))

    def open(self, shard: int) -> TarShard | FilteredShard:
        """The shard's records; shared while anyone holds it. Raises UserError where it holds more than it promises."""
        tar = self._open.get(shard)
        if tar is None:
            info = self.shards[shard]
            again = partial(self.local_path, info) if is_remote(info.url) else None
            whole = TarShard(self.local_path(info), info.url, again)
            if len(whole) > info.samples:
                raise UserError(
                    "what the shards hold is out of date",
                    got=f"{info.url} holds {len(whole)} samples, {self.index or self.url} says {info.samples}",
                    fix=f"delete {self.index}: it is made again on the next use" if self.index else "run it again",
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
        return ShardSet(url, _read_filtered(url, cache), cache, limit)
    folder, names = parse_location(url)
    fs, path = open_location(folder)
    known = _read_index(fs, path, folder)
    if names is None:
        stored = list_folder(fs, path, url, known)
        if known is not None and (missing := known.keys() - stored.keys()):
            raise UserError(
                f"{INDEX} does not match the shards beside it",
                got=f"{url} has no {first_names(missing)}",
                fix=f"restore the missing shards, or delete {folder}/{INDEX}: it is made again on the next use",
            )
    else:
        stored = {name: look(fs, f"{path}/{name}", url) for name in names}
    beside = Path(path) if names is None and is_local(fs) else None
    shards, index = _describe(folder, stored, known or {}, cache, beside)
    return ShardSet(url, shards, cache, limit, index)


def write_index(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Writes shards.json; `shards` are records of name, samples, bytes and sha256."""
    write_json(folder / INDEX, {"format_version": FORMAT_VERSION, "shards": shards})


# ------------------------------------------------------------------ filtered lists


def write_filtered(path: Path, shards: Iterable[ShardInfo]) -> None:
    """Writes a filtered list: see filtered.py."""
    write_json(path, {"format_version": FORMAT_VERSION, "shards": [vars(info) for info in shards]})


def _read_filtered(url: str, cache: ShardCache | None) -> tuple[ShardInfo, ...]:
    """The shards of a filtered list, if they are still those that it was made of: it leaves records out by number."""
    fs, path = open_location(url)
    try:
        entries = json.loads(storage.retrying(fs.cat_file, path))["shards"]
        listed = [ShardInfo(**{**entry, "excluded": tuple(entry["excluded"])}) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("the list of shards does not exist", got=url) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the list of shards cannot be read", got=f"{url}: {error!r}", fix="sslscale dedup") from None
    now: dict[str, ShardInfo] = {}
    for folder, infos in itertools.groupby(listed, key=lambda info: info.url.rpartition("/")[0]):
        now |= {info.url: info for info in _as_they_are(folder, {info.name: info for info in infos}, cache)}
    changed = [info.name for info in listed if info.url not in now or info.is_other(now[info.url])]
    if changed:
        raise UserError(
            "the shards changed since dedup",
            got=f"{url}: {first_names(changed)}",
            fix="restore the shards, or run sslscale dedup on the new ones",
        )
    return tuple(replace(info, version=now[info.url].version) for info in listed)


def _as_they_are(folder: str, listed: Mapping[str, ShardInfo], cache: ShardCache | None) -> Sequence[ShardInfo]:
    """Those of the shards that are there, as they are now."""
    fs, path = open_location(folder)
    if "http" in fs.protocol:  # web servers need not list their folders
        stored = {name: look(fs, f"{path}/{name}", folder) for name in listed}
    else:
        stored = {name: one for name, one in list_folder(fs, path, folder, None).items() if name in listed}
    known = {name: vars(info) for name, info in listed.items()} | (_read_index(fs, path, folder) or {})
    return _describe(folder, stored, known, cache, beside=None)[0]


# ------------------------------------------------------------------ shards.json


def _describe(
    folder: str,
    stored: Mapping[str, Stored],
    known: Mapping[str, Mapping[str, Any]],
    cache: ShardCache | None,
    beside: Path | None,
) -> tuple[tuple[ShardInfo, ...], str | None]:
    """The shards of a folder as they are now, and the file that says so; `known` is what an index says of them."""
    index: str | None = f"{folder}/{INDEX}"
    valid: Mapping[str, Mapping[str, Any]] = {
        name: entry for name, entry in known.items() if name in stored and not _is_stale(entry, stored[name])
    }
    if not valid.keys() >= stored.keys():
        valid, index = _make_index(folder, stored, valid, cache, beside)
    shards = tuple(
        ShardInfo(
            name=name,
            url=f"{folder}/{name}",
            samples=valid[name]["samples"],
            bytes=now.bytes,  # as it is, not as promised
            sha256=valid[name]["sha256"],
            layout=valid[name]["layout"],
            version=now.version,
            cut=valid[name]["bytes"] != now.bytes,
        )
        for name, now in stored.items()
    )
    return shards, index


def _read_index(fs: fsspec.AbstractFileSystem, path: str, folder: str) -> dict[str, dict[str, Any]] | None:
    """Name -> what shards.json says of it; None where there is no shards.json."""
    try:
        text = storage.retrying(fs.cat_file, f"{path}/{INDEX}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _check_index(text, f"{folder}/{INDEX}")


def _is_stale(entry: Mapping[str, Any], now: Stored) -> bool:
    """Whether we counted what the shard held, and it has changed since; who wrote a hash has promised its samples."""
    if entry["sha256"] is not None:
        return False
    return now.bytes != entry["bytes"] or _is_rewritten(entry["version"], now.version)


def _is_rewritten(before: str | None, now: str | None) -> bool:
    """Whether the versions differ, where one store told both: they begin with how it tells them."""
    if before is None or now is None or before.partition(":")[0] != now.partition(":")[0]:
        return False
    return before != now


def _check_index(text: bytes, where: str) -> dict[str, dict[str, Any]]:
    try:
        index = json.loads(text)
        version, shards = index["format_version"], index["shards"]
        entries = {
            s["name"]: {field: s[field] if field in _ALWAYS else s.get(field) for field in _FIELDS} for s in shards
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{INDEX} cannot be read", got=f"{where}: {error!r}", fix="delete it: it is made again"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"{INDEX} has an unknown format", got=f"{where}: {version}", allowed=FORMAT_VERSION)
    return entries


def _make_index(
    folder: str,
    stored: Mapping[str, Stored],
    known: Mapping[str, Mapping[str, Any]],
    cache: ShardCache | None,
    beside: Path | None,
) -> tuple[Mapping[str, Mapping[str, Any]], str | None]:
    """One pass over the headers of the shards that are not `known`, kept in shards.json beside them, or in the cache.

    Returns what the index says of each, and where it is kept. What a damaged shard has lost cannot be counted here: it
    counts as one sample, which then fails.
    """
    kept = cache.folder / "indexes" / f"{hash_json([folder, stored])}.json" if cache else None
    if kept is not None and kept.is_file():
        return _check_index(kept.read_bytes(), str(kept)), str(kept)
    shards = {name: known.get(name) or _count(f"{folder}/{name}", now, cache) for name, now in stored.items()}
    rows = [{"name": name, **{field: entry[field] for field in _FIELDS}} for name, entry in shards.items()]
    if beside is not None and os.access(beside, os.W_OK):
        write_index(beside, rows)
        return shards, f"{folder}/{INDEX}"
    if kept is not None:
        write_json(kept, {"format_version": FORMAT_VERSION, "shards": rows})
    return shards, str(kept) if kept is not None else None


def _count(url: str, now: Stored, cache: ShardCache | None) -> dict[str, Any]:
    """What the headers of a shard tell of it."""
    remote = RemoteShard(url, now.bytes, None, now.version)
    path = _local_path(remote, cache) if is_remote(url) else _as_path(url)
    if not os.access(path, os.R_OK):
        raise UserError("a shard cannot be read", got=path, fix="give this user the permission to")
    tar = TarShard(path)
    samples = len(tar) + (tar.damage is not None)
    return {"samples": samples, "bytes": now.bytes, "sha256": None, "layout": tar.layout, "version": now.version}


# ------------------------------------------------------------------ copies


def _remote_shard(info: ShardInfo) -> RemoteShard:
    return RemoteShard(info.url, info.bytes, None if info.cut else info.sha256, info.version)


def _local_path(shard: RemoteShard, cache: ShardCache | None) -> Path:
    if cache is None:
        raise UserError("remote shards need a cache folder for their copies", got=shard.url)
    return cache.copy(shard)


def _as_path(url: str) -> Path:
    return Path(url.rpartition("://")[2]).expanduser()
