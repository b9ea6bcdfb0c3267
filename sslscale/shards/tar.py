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
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 512
MAX_OPEN = 128  # files kept open: many streams over many small shards would pass the limit of a process
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp")
ALLOWED = frozenset((*IMAGES, "cls", "txt", "json", "mp4", "npy"))  # judged by the last part: `seg.png` is a png
UNPICKLED = frozenset(("pkl", "pickle", "pyd", "pt", "pth", "joblib"))

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_TIME = re.compile(rb"(\d+) [acm]time=[^\n]*\n")  # a pax header as webdataset's own writer makes them
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR, _LINKS = b"0\x007", b"12"
_DATALESS = b"123456"  # links, devices, folders and pipes have no data, whatever their size says
_DEREFERENCE = "-h --hard-dereference"  # GNU tar's flags that store what a link points to
# Errors that say something of the file, and not of the moment: what is read again would find it as well.
_LOST = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PAUSES = (0.1, 0.4)  # seconds, before a read that failed is tried again
_ADLER = 65521
_RUN = 8192  # headers that are checked together
_NO_NUMBER = 1 << 63  # past the end of any file
_SHORT_RUN = 16  # below this, one after the other is as fast
_OCTAL = 8 ** np.arange(5, -1, -1)


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
            except _Damage as damage:
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
                raise _Damage(f"truncated: no end-of-archive mark before byte {size}")
            if header[0] == 0 and not any(header):
                return
            _check(header, position)
            kind = header[156:157]
            length = 0 if kind in _DATALESS else pax.get("size") or _number(header[124:136], position)
            start = position + BLOCK
            position = start + _padded(length)
            if kind in b"LKxg":
                if start + length > size:
                    raise _Damage(f"truncated: the file ends within the header at byte {start - BLOCK}")
                if kind == b"L":
                    long_name = _text(tar[start : start + length])
                elif kind == b"x":
                    pax = {**pax_global, **_pax(tar[start : start + length], start)}
                elif kind == b"g":
                    pax_global.update(_pax(tar[start : start + length], start))
                    pax = dict(pax_global)
                continue
            name = pax.get("path") or long_name or _name(header)
            shown = _shown(name)
            if kind == b"S" or "GNU.sparse.major" in pax or "GNU.sparse.size" in pax:
                raise _Damage(f"the member at byte {start - BLOCK}, {shown}, is sparse, which is not supported")
            record = self._add(name, start, length, kind in _LINKS) if kind in _REGULAR + _LINKS else None
            if start + length > size:
                reason = f"truncated: the file ends at byte {size}, within {shown}"
                if record is not None:
                    self._refused.setdefault(record, reason)
                raise _Damage(reason)
            long_name, pax = None, dict(pax_global)

    def _run(self, tar: mmap.mmap, position: int, size: int) -> tuple[int, int]:
        """Adds the members from `position` on that have plain headers, many at once.

        Returns where it stopped, and how many headers from there on are to be taken one after the other: whatever is
        not a whole regular file with a plain, right header is left to `_walk`.
        """
        while True:
            positions, sizes = _plain_headers(tar, position, size)
            if len(positions) < _SHORT_RUN:
                return position, len(positions) + 1
            names = _checked_names(tar, positions)
            for name, start, length in zip(names, positions, sizes, strict=False):
                if length >= 0:
                    self._add(name, start + BLOCK, length)
                    position = start + BLOCK + _padded(length)
            if len(names) < _RUN:
                return position, len(positions) - len(names) + 1

    def _add(self, name: str, start: int, length: int, is_link: bool = False) -> int | None:
        """The record that the member now belongs to; None for a name that gives none."""
        given, name = name, _shown(name)
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


def _plain_headers(tar: mmap.mmap, position: int, size: int) -> tuple[list[int], list[int]]:
    """Where at least _RUN headers are, and the sizes of their files; up to the first that looks unusual.

    Usual are regular files, and before them pax headers that say nothing but times: their size is given as -1.
    """
    positions: list[int] = []
    sizes: list[int] = []
    while len(positions) < _RUN:
        start = position
        kind, length = _kind_and_length(tar, start, size)
        if kind == b"x" and _is_time(tar[start + BLOCK : start + BLOCK + length]):
            start += BLOCK + _padded(length)
            kind, length = _kind_and_length(tar, start, size)
        if kind not in _REGULAR:
            break
        if start != position:
            positions.append(position)
            sizes.append(-1)
        positions.append(start)
        sizes.append(length)
        position = start + BLOCK + _padded(length)
    return positions, sizes


def _kind_and_length(tar: mmap.mmap, position: int, size: int) -> tuple[bytes, int]:
    """Of a header in its usual form whose data is whole; any other is of kind "?"."""
    fields = tar[position + 124 : position + 157]  # the length, then others, then the kind
    if len(fields) == 33 and fields[11] in b"\0 " and fields[:11].isdigit():
        length = _octal(fields[:11])
        if position + BLOCK + length <= size:
            return fields[32:], length
    return b"?", 0


def _is_time(data: bytes) -> bool:
    match = _TIME.fullmatch(data)
    return match is not None and int(match[1]) == len(data)


def _checked_names(tar: mmap.mmap, positions: list[int]) -> list[str]:
    """The names in these headers, up to the first whose checksum is wrong or that is not of the usual form."""
    blocks = np.frombuffer(tar, dtype=np.uint8, count=positions[-1] + BLOCK).reshape(-1, BLOCK)
    headers = blocks[np.array(positions) // BLOCK]  # a copy: the map can be closed
    stored = headers[:, 148:156]
    digits = stored[:, :6] - np.uint8(ord("0"))
    total = headers.sum(axis=1, dtype=np.int64) - stored.sum(axis=1, dtype=np.int64) + 8 * 0x20
    right = (digits < 8).all(axis=1) & (stored[:, 6] == 0) & (digits @ _OCTAL == total)
    count = len(right) if right.all() else int(right.argmin())
    names = [_text(name) for name in np.ascontiguousarray(headers[:count, :100]).view("S100")[:, 0].tolist()]
    for index in np.flatnonzero(headers[:count, 345]):  # a path that goes on in another field
        names[index] = _name(headers[index].tobytes())
    return names


def _padded(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK * BLOCK


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


class _Damage(Exception):
    """What ends the pass over the headers."""


def _check(header: bytes, position: int) -> None:
    """The header's checksum: the sum of its bytes, with its own eight taken as blanks."""
    # The low half of adler32 is 1 + that sum, modulo 65521: the same test at a fraction of the cost of sum().
    total = (zlib.adler32(header[:148]) & 0xFFFF) + (zlib.adler32(header[156:]) & 0xFFFF) - 2 + 8 * 0x20
    if (total - _number(header[148:156], position)) % _ADLER:
        raise _Damage(f"corrupt: the header at byte {position} fails its checksum")


def _number(field: bytes, position: int) -> int:
    """An octal field, or GNU's base 256 where its first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    if digits.isdigit() and (number := _octal(digits)) < _NO_NUMBER:  # int() knows signs and underscores, too
        return number
    raise _Damage(f"corrupt: the header at byte {position} has a bad number")


def _octal(digits: bytes) -> int:
    """Decimal digits as an octal number; _NO_NUMBER where there is an 8 or a 9."""
    try:
        return int(digits, 8)
    except ValueError:
        return _NO_NUMBER


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own format keeps other things there
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    """The name as it is; where it is not UTF-8, with the bytes that are not as \\xe9."""
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _pax(data: bytes, position: int) -> dict[str, Any]:
    """The records "<length> <keyword>=<value>\\n" of a pax extended header; `size` as an integer."""
    values: dict[str, Any] = {}
    start = 0
    while start < len(data) and data[start]:
        length, _, _ = data[start : start + 20].partition(b" ")
        record = data[start + len(length) + 1 : start + int(length)] if length.isdigit() else b""
        keyword, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _Damage(f"corrupt: the pax header at byte {position} cannot be read")
        values[_text(keyword)] = _text(value[:-1])
        start += int(length)
    if "size" in values:
        if not values["size"].isdigit():
            raise _Damage(f"corrupt: the pax header at byte {position} has a bad size")
        values["size"] = int(values["size"])
    return values
