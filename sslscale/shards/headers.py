"""The 512-byte headers of a tar: checked and read, one by one or many at once."""

from __future__ import annotations

import mmap
import re
import zlib
from typing import Any

import numpy as np

BLOCK = 512
RUN = 8192  # headers that are checked together
REGULAR = b"0\x007"  # kinds of members that are files

_TIME = re.compile(rb"(\d+) [acm]time=[^\n]*\n")  # a pax header as webdataset's own writer makes them
_ADLER = 65521
_NO_NUMBER = 1 << 63  # past the end of any file
_OCTAL = 8 ** np.arange(5, -1, -1)


class Damage(Exception):
    """What ends the pass over the headers."""


def check(header: bytes, position: int) -> None:
    """The header's checksum: the sum of its bytes, with its own eight taken as blanks."""
    # The low half of adler32 is 1 + that sum, modulo 65521: the same test at a fraction of the cost of sum().
    total = (zlib.adler32(header[:148]) & 0xFFFF) + (zlib.adler32(header[156:]) & 0xFFFF) - 2 + 8 * 0x20
    if (total - number_of(header[148:156], position)) % _ADLER:
        raise Damage(f"corrupt: the header at byte {position} fails its checksum")


def number_of(field: bytes, position: int) -> int:
    """An octal field, or GNU's base 256 where its first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    if digits.isdigit() and (number := _octal(digits)) < _NO_NUMBER:  # int() knows signs and underscores, too
        return number
    raise Damage(f"corrupt: the header at byte {position} has a bad number")


def _octal(digits: bytes) -> int:
    """Decimal digits as an octal number; _NO_NUMBER where there is an 8 or a 9."""
    try:
        return int(digits, 8)
    except ValueError:
        return _NO_NUMBER


def name_of(header: bytes) -> str:
    name = text_of(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own format keeps other things there
        return f"{text_of(header[345:500])}/{name}"
    return name


def text_of(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def legible(name: str) -> str:
    """The name as it is; where it is not UTF-8, with the bytes that are not as \\xe9."""
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def pax_of(data: bytes, position: int) -> dict[str, Any]:
    """The records "<length> <keyword>=<value>\\n" of a pax extended header; `size` as an integer."""
    values: dict[str, Any] = {}
    start = 0
    while start < len(data) and data[start]:
        length, _, _ = data[start : start + 20].partition(b" ")
        record = data[start + len(length) + 1 : start + int(length)] if length.isdigit() else b""
        keyword, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise Damage(f"corrupt: the pax header at byte {position} cannot be read")
        values[text_of(keyword)] = text_of(value[:-1])
        start += int(length)
    if "size" in values:
        if not values["size"].isdigit():
            raise Damage(f"corrupt: the pax header at byte {position} has a bad size")
        values["size"] = int(values["size"])
    return values


def plain_headers(tar: mmap.mmap, position: int, size: int) -> tuple[list[int], list[int]]:
    """Where at least RUN headers are, and the sizes of their files; up to the first that looks unusual.

    Usual are regular files, and before them pax headers that say nothing but times: their size is given as -1.
    """
    positions: list[int] = []
    sizes: list[int] = []
    while len(positions) < RUN:
        start = position
        kind, length = _kind_and_length(tar, start, size)
        if kind == b"x" and _is_time(tar[start + BLOCK : start + BLOCK + length]):
            start += BLOCK + padded(length)
            kind, length = _kind_and_length(tar, start, size)
        if kind not in REGULAR:
            break
        if start != position:
            positions.append(position)
            sizes.append(-1)
        positions.append(start)
        sizes.append(length)
        position = start + BLOCK + padded(length)
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


def checked_names(tar: mmap.mmap, positions: list[int]) -> list[str]:
    """The names in these headers, up to the first whose checksum is wrong or that is not of the usual form."""
    blocks = np.frombuffer(tar, dtype=np.uint8, count=positions[-1] + BLOCK).reshape(-1, BLOCK)
    headers = blocks[np.array(positions) // BLOCK]  # a copy: the map can be closed
    stored = headers[:, 148:156]
    digits = stored[:, :6] - np.uint8(ord("0"))
    total = headers.sum(axis=1, dtype=np.int64) - stored.sum(axis=1, dtype=np.int64) + 8 * 0x20
    right = (digits < 8).all(axis=1) & (stored[:, 6] == 0) & (digits @ _OCTAL == total)
    count = len(right) if right.all() else int(right.argmin())
    names = [text_of(name) for name in np.ascontiguousarray(headers[:count, :100]).view("S100")[:, 0].tolist()]
    for index in np.flatnonzero(headers[:count, 345]):  # a path that goes on in another field
        names[index] = name_of(headers[index].tobytes())
    return names


def padded(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK * BLOCK
