"""Tar bytes into samples: one pass over the 512-byte headers, then any record by its index.

Format: POSIX.1-1988 ustar, POSIX.1-2001 pax and GNU long names. Files that share a key (webdataset's rule: the path up
to the first dot of its last component) and follow each other are one record. The `._` files that macOS's tar writes
beside others are no members.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import os
import re
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sslscale.shards.headers import (
    BLOCK,
    REGULAR,
    RUN,
    Damage,
    check,
    checked_names,
    legible,
    name_of,
    number_of,
    padded,
    pax_of,
    plain_headers,
    text_of,
)

MAX_OPEN = 128  # files kept open: many streams over many small shards would pass the limit of a process
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp")
ALLOWED = frozenset((*IMAGES, "cls", "txt", "json", "mp4", "npy"))  # judged by the last part: `seg.png` is a png
UNPICKLED = frozenset(("pkl", "pickle", "pyd", "pt", "pth", "joblib"))

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_LINKS = b"12"
_DATALESS = b"123456"  # links, devices, folders and pipes have no data, whatever their size says
_DEREFERENCE = "-h --hard-dereference"  # GNU tar's flags that store what a link points to
# Errors that say something of the file, and not of the moment: what is read again would find it as well.
_LOST = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PAUSES = (0.1, 0.4)  # seconds, before a read that failed is tried again
_SHORT_RUN = 16  # below this, one after the other is as fast


class SampleError(Exception):
    """A record that gives no sample; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class TarShard:
    """The records of one tar file. `len(shard)`, `shard.keys`, `shard.read(i)`.

    A damaged file, or one that is not there, raises nothing here; what passes (a stale handle, too many open files) is
    an OSError, here and in `read`. `damage` says what ends it early (None: it is
    whole), and the records after that point are not in it. `again` makes the file anew, where it is one that others may
    delete; what that raises is raised here, too.
    """

    def __init__(self, path: str | Path, url: str | None = None, again: Callable[[], Any] | None = None) -> None:
        self.path, self._again = str(path), again
        self.url = url or self.path
        self.keys: list[str] = []
        self.damage: str | None = None
        self._prefix = "\0"  # of the names of the last record's members; no name that gives a record begins with it
        self._seen: set[str] = set()  # the extensions of the last record's members
        self._first = array("q")  # the first member of each record; one more at the end
        self._extensions: list[str] = []  # of each member
        self._offsets, self._sizes = array("q"), array("q")  # of each member's data, in bytes
        self._refused: dict[int, str] = {}  # record -> reason
        self._stamp: tuple[int, ...] = ()
        try:
            file = self._reopen()
        except OSError as error:
            if again is not None or error.errno not in _LOST:
                raise
            self.damage = f"the shard cannot be opened: {error.strerror}"
        else:
            self._stamp = _stamp(file)
            self._index(file.descriptor, self._stamp[0])
        self._first.append(len(self._offsets))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def layout(self) -> str:
        """A short hash of what the headers tell: the names, sizes, places and times of the members."""
        names = "\0".join(itertools.chain(self.keys, self._extensions)).encode()
        numbers = (self._first.tobytes(), self._offsets.tobytes(), self._sizes.tobytes(), self._times())
        return hashlib.sha256(b"\0".join((names, *numbers))).hexdigest()[:16]

    def _times(self) -> bytes:
        """When each member was last written, as its header has it: a member of the same size may be another."""
        if not self._offsets:
            return b""
        descriptor = self._file().descriptor
        with mmap.mmap(descriptor, self._stamp[0], access=mmap.ACCESS_READ) as tar:
            headers = np.frombuffer(self._offsets, dtype=np.int64) - BLOCK
            found = np.frombuffer(tar, dtype=np.uint8)[headers[:, None] + np.arange(136, 148)].tobytes()
        return found

    def read(self, record: int) -> dict[str, Any]:
        """A webdataset sample: `__key__`, `__url__` and the bytes of each extension. Raises SampleError."""
        if record in self._refused:
            raise SampleError(self._refused[record])
        file = self._file()
        sample: dict[str, Any] = {"__key__": self.keys[record], "__url__": self.url}
        for member in range(self._first[record], self._first[record + 1]):
            # Not through the map: a page fault would hold the GIL, and a file cut off meanwhile would kill the process.
            try:
                data = os.pread(file.descriptor, self._sizes[member], self._offsets[member])
                if len(data) != self._sizes[member]:
                    data = self._read_on(file, member, data)
            except OSError as error:
                data = self._read_again(file, member, error)
            sample[self._extensions[member]] = data
        return sample

    def _read_again(self, file: _File, member: int, error: OSError) -> bytes:
        """The member, from a disk that did not answer: a block of it may be lost, or its server away for a moment."""
        for pause in _PAUSES:
            if error.errno != errno.EIO:
                raise error
            time.sleep(pause)
            try:
                return self._read_on(file, member, b"")
            except OSError as another:
                error = another
        raise SampleError(f"the .{self._extensions[member]} cannot be read: {error.strerror}") from None

    def _read_on(self, file: _File, member: int, data: bytes) -> bytes:
        """The member whole, of which `data` is the beginning: one read gives 2 GiB at most."""
        pieces, missing = [data], self._sizes[member] - len(data)
        while missing:
            pieces.append(os.pread(file.descriptor, missing, self._offsets[member] + self._sizes[member] - missing))
            if not pieces[-1]:
                raise SampleError(f"truncated: the file ends within {self._extensions[member]}")
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def _file(self) -> _File:
        """The file that was indexed; where it can be made anew, as good: another copy of the same size."""
        while True:
            try:
                return _open(self.path, self._stamp)
            except SampleError:
                if self._again is None:
                    raise
                stamp = _stamp(self._reopen())
                if stamp[0] != self._stamp[0]:
                    raise
                self._stamp = stamp

    def _reopen(self) -> _File:
        """The file, made again as often as others delete it."""
        while True:
            try:
                return _File(os.open(self.path, os.O_RDONLY))
            except FileNotFoundError:
                if self._again is None:
                    raise
                self._again()

    # ------------------------------------------------------------------ the pass over the headers

    def _index(self, descriptor: int, size: int) -> None:
        if size == 0:
            self.damage = "the shard is empty (zero bytes)"
            return
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as tar:
            try:
                self._walk(tar, size)
            except Damage as damage:
                self.damage = str(damage)

    def _walk(self, tar: mmap.mmap, size: int) -> None:
        position, long_name = 0, None  # type: int, str | None
        pax, pax_global = {}, {}  # type: dict[str, Any], dict[str, Any]
        alone = 0  # headers to take one after the other before many at once are tried again
        while True:
            if not (alone or pax or long_name):
                position, alone = self._run(tar, position, size)
            alone = max(alone - 1, 0)
            header = tar[position : position + BLOCK]
            if len(header) < BLOCK:
                raise Damage(f"truncated: no end-of-archive mark before byte {size}")
            if header[0] == 0 and not any(header):
                return
            check(header, position)
            kind = header[156:157]
            length = 0 if kind in _DATALESS else pax.get("size") or number_of(header[124:136], position)
            start = position + BLOCK
            position = start + padded(length)
            if kind in b"LKxg":
                if start + length > size:
                    raise Damage(f"truncated: the file ends within the header at byte {start - BLOCK}")
                if kind == b"L":
                    long_name = text_of(tar[start : start + length])
                elif kind == b"x":
                    pax = {**pax_global, **pax_of(tar[start : start + length], start)}
                elif kind == b"g":
                    pax_global.update(pax_of(tar[start : start + length], start))
                    pax = dict(pax_global)
                continue
            name = pax.get("path") or long_name or name_of(header)
            shown = legible(name)
            if kind == b"S" or "GNU.sparse.major" in pax or "GNU.sparse.size" in pax:
                raise Damage(f"the member at byte {start - BLOCK}, {shown}, is sparse, which is not supported")
            record = self._add(name, start, length, kind in _LINKS) if kind in REGULAR + _LINKS else None
            if start + length > size:
                reason = f"truncated: the file ends at byte {size}, within {shown}"
                if record is not None:
                    self._refused.setdefault(record, reason)
                raise Damage(reason)
            long_name, pax = None, dict(pax_global)

    def _run(self, tar: mmap.mmap, position: int, size: int) -> tuple[int, int]:
        """Adds the members from `position` on that have plain headers, many at once.

        Returns where it stopped, and how many headers from there on are to be taken one after the other: whatever is
        not a whole regular file with a plain, right header is left to `_walk`.
        """
        while True:
            positions, sizes = plain_headers(tar, position, size)
            if len(positions) < _SHORT_RUN:
                return position, len(positions) + 1
            names = checked_names(tar, positions)
            for name, start, length in zip(names, positions, sizes, strict=False):
                if length >= 0:
                    self._add(name, start + BLOCK, length)
                    position = start + BLOCK + padded(length)
            if len(names) < RUN:
                return position, len(positions) - len(names) + 1

    def _add(self, name: str, start: int, length: int, is_link: bool = False) -> int | None:
        """The record that the member now belongs to; None for a name that gives none."""
        given, name = name, legible(name)
        rest = name[len(self._prefix) :] if name.startswith(self._prefix) else "/"
        if "/" in rest:  # of another record, most likely
            match = _KEY.fullmatch(name)
            if match is None or _META.match(name):
                return None
            key, rest = match.groups()
            in_folder = key.endswith("/")  # a name that begins with a dot, which is not in its key
            if in_folder and rest.startswith("_"):
                return None
            if not self.keys or key != self.keys[-1]:
                self.keys.append(key)
                self._prefix = "\0" if in_folder or key.startswith("__") else f"{key}."
                self._first.append(len(self._offsets))
                self._seen.clear()
        extension = sys.intern(rest.lower())
        record, kind = len(self.keys) - 1, extension.rpartition(".")[2]
        if name != given:
            self._refused.setdefault(record, "its name is not UTF-8")
        elif kind not in ALLOWED:
            reason = "it would be unpickled" if kind in UNPICKLED else f"allowed are {' '.join(sorted(ALLOWED))}"
            self._refused.setdefault(record, f"refused member .{extension}: {reason}")
        elif is_link:
            self._refused.setdefault(record, f"the .{extension} is a link, which has no data: tar with {_DEREFERENCE}")
        elif extension in self._seen:
            self._refused.setdefault(record, f"two members .{extension}")
        self._seen.add(extension)
        self._extensions.append(extension)
        self._offsets.append(start)
        self._sizes.append(length)
        return record


@dataclass(frozen=True)
class _File:
    """An open file, closed with the last reference to it."""

    descriptor: int

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=MAX_OPEN)
def _open(path: str, stamp: tuple[int, ...]) -> _File:
    try:
        file = _File(os.open(path, os.O_RDONLY))
    except OSError as error:
        if error.errno not in _LOST:
            raise
        raise SampleError(f"the shard cannot be opened: {error.strerror}") from None
    if _stamp(file) != stamp:
        raise SampleError("the shard was replaced while it was being read")
    return file


def _stamp(file: _File) -> tuple[int, ...]:
    status = os.fstat(file.descriptor)
    return status.st_size, status.st_ino, status.st_mtime_ns
