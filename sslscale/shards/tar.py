"""Tar bytes into samples: one pass over the 512-byte headers, then any record by its index.

Format: POSIX.1-1988 ustar, POSIX.1-2001 pax and GNU long names. Files that share a key (webdataset's rule: the path up
to the first dot of its last component) and follow each other are one record.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
import zlib
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

BLOCK = 512
MAX_OPEN = 128  # files kept open: many streams over many small shards would pass the limit of a process
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp")
ALLOWED = frozenset((*IMAGES, "cls", "txt", "json", "mp4", "npy"))  # judged by the last part: `seg.png` is a png
UNPICKLED = frozenset(("pkl", "pickle", "pyd", "pt", "pth", "joblib"))

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR, _DATALESS = b"0\x007", b"123456"  # links, devices, folders and pipes have no data, whatever their size says
_ADLER = 65521


class SampleError(Exception):
    """A record that gives no sample; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class TarShard:
    """The records of one tar file. `len(shard)`, `shard.keys`, `shard.read(i)`.

    A damaged file raises nothing here. `damage` says what ends it early (None: it is whole), and the records after
    that point are not in it. `problems` lists `(key, reason)` for every record that `read` will refuse, and
    `(None, damage)`.
    """

    def __init__(self, path: str | Path, url: str | None = None) -> None:
        self.path = str(path)
        self.url = url or self.path
        self.keys: list[str] = []
        self.damage: str | None = None
        self._first = array("q")  # the first member of each record; one more at the end
        self._extensions: list[str] = []  # of each member
        self._offsets, self._sizes = array("q"), array("q")  # of each member's data, in bytes
        self._refused: dict[int, str] = {}  # record -> reason
        with Path(self.path).open("rb") as file:
            self._stamp = _stamp(file.fileno())
            self._index(file.fileno(), self._stamp[0])
        self._first.append(len(self._offsets))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def problems(self) -> list[tuple[str | None, str]]:
        found: list[tuple[str | None, str]] = [(self.keys[record], why) for record, why in self._refused.items()]
        return [*found, (None, self.damage)] if self.damage else found

    def read(self, record: int) -> dict[str, Any]:
        """A webdataset sample: `__key__`, `__url__` and the bytes of each extension. Raises SampleError."""
        if record in self._refused:
            raise SampleError(self._refused[record])
        file = _open(self.path, self._stamp)
        sample: dict[str, Any] = {"__key__": self.keys[record], "__url__": self.url}
        for member in range(self._first[record], self._first[record + 1]):
            # Not through the map: a page fault would hold the GIL, and a file cut off meanwhile would kill the process.
            data = os.pread(file.descriptor, self._sizes[member], self._offsets[member])
            if len(data) != self._sizes[member]:
                raise SampleError(f"truncated: the file ends within {self._extensions[member]}")
            sample[self._extensions[member]] = data
        return sample

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
        while True:
            header = tar[position : position + BLOCK]
            if len(header) < BLOCK:
                raise _Damage(f"truncated: no end-of-archive mark before byte {size}")
            if header[0] == 0 and not any(header):
                return
            _check(header, position)
            kind = header[156:157]
            length = 0 if kind in _DATALESS else pax.get("size") or _number(header[124:136], position)
            start = position + BLOCK
            position = start + (length + BLOCK - 1) // BLOCK * BLOCK
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
            if kind == b"S" or "GNU.sparse.major" in pax or "GNU.sparse.size" in pax:
                raise _Damage(f"the member at byte {start - BLOCK}, {name}, is sparse, which is not supported")
            record = self._add(name, start, length) if kind in _REGULAR else None
            if start + length > size:
                reason = f"truncated: the file ends at byte {size}, within {name}"
                if record is not None:
                    self._refused.setdefault(record, reason)
                raise _Damage(reason)
            long_name, pax = None, dict(pax_global)

    def _add(self, name: str, start: int, length: int) -> int | None:
        """The record that the member now belongs to; None where webdataset skips such a name too."""
        match = _KEY.fullmatch(name)
        if match is None or _META.match(name):
            return None
        key, extension = match[1], sys.intern(match[2].lower())
        if not self.keys or key != self.keys[-1]:
            self.keys.append(key)
            self._first.append(len(self._offsets))
        record, kind = len(self.keys) - 1, extension.rpartition(".")[2]
        if kind not in ALLOWED:
            reason = "it would be unpickled" if kind in UNPICKLED else f"allowed are {' '.join(sorted(ALLOWED))}"
            self._refused.setdefault(record, f"refused member .{extension}: {reason}")
        elif extension in self._extensions[self._first[record] :]:
            self._refused.setdefault(record, f"two members .{extension}")
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
    file = _File(os.open(path, os.O_RDONLY))
    if _stamp(file.descriptor) != stamp:
        raise SampleError("the shard was replaced while it was being read")
    return file


def _stamp(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
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
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _Damage(f"corrupt: the header at byte {position} has a bad number") from None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own format keeps other things there
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


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
