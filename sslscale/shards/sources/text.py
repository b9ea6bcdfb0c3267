"""Texts in files: one a line, or JSONL with a text field and an optional label field; plain, .gz, .bz2 or .xz.

A folder holds one file a split (`train.jsonl.gz`, `test.jsonl.gz`); a single file is the split `train`. A file's name
says what its lines are: `.txt` or `.jsonl`, in small letters or large.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from sslscale.errors import UserError, did_you_mean
from sslscale.shards.sources import Example, extension_of, most_first

_COMPRESSED = ("gz", "bz2", "xz")
_FORMATS = ("txt", "jsonl")
_ALLOWED = "NAME.txt or NAME.jsonl, plain or with .gz, .bz2 or .xz"
_KINDS = {str: "names", int: "integers", bool: "true and false"}  # of labels


class Text:
    """Reads a file forward, whatever its size: a worker's shards come in order, so it goes through the file once.

    A line of .txt is a text, an empty one too: it then fails where it is read. Blank lines of .jsonl are no records.
    Labels are of one kind. Integers stay as they are, true is 1 and false 0; names are numbered as they sort, over all
    splits, and go into the sample's metadata. Records without the field, or with null in it, have no label.
    """

    def __init__(self, path: str | None = None, *, text: str = "text", label: str | None = None) -> None:
        if path is None:
            raise UserError("text needs the file of the texts, or a folder of one a split", fix="pack.path=FILE")
        self.field, self.label_field = text, label
        self.files, self.skipped = _files(Path(path).expanduser())
        self._lines: dict[str, tuple[int, Iterator[tuple[int, bytes]]]] = {}
        self.splits: dict[str, int] = {}
        labels = None if label is None else _Labels(label)
        digest = hashlib.sha256(json.dumps([text, label]).encode())
        for split, file in self.files.items():
            self.splits[split] = 0
            for number, line in _read_lines(file):
                digest.update(line)
                self.splits[split] += 1
                if labels is not None and _format(file) == "jsonl":
                    labels.add(_record(file, number, line), f"{file}, line {number}")
            digest.update(json.dumps([split, _format(file), self.splits[split]]).encode())
        self.numbers = {} if labels is None else labels.numbers()
        self.fingerprint = digest.hexdigest()

    def example(self, split: str, index: int) -> Example:
        (number, line), file = self._line(split, index), self.files[split]
        if _format(file) == "txt":
            return Example(line.rstrip(b"\r\n"), extension="txt")
        record = _record(file, number, line)
        if not isinstance(record.get(self.field), str):
            raise UserError(
                f"a record has no text in {self.field!r}",
                got=f"{file}, line {number}: {', '.join(record)}",
                fix="pack.options.text=FIELD",
            )
        data = record[self.field].encode("utf-8", "surrogatepass")
        label = None if self.label_field is None else record.get(self.label_field)
        if isinstance(label, str):
            return Example(data, self.numbers[label], "txt", {"class": label})
        return Example(data, None if label is None else int(label), "txt")

    def _line(self, split: str, index: int) -> tuple[int, bytes]:
        at, lines = self._lines.get(split, (0, iter(())))
        if at == 0 or at > index:
            at, lines = 0, _read_lines(self.files[split])
        for _ in range(index - at):
            next(lines)
        self._lines[split] = index + 1, lines
        return next(lines)


class _Labels:
    """What the records say in the field of the labels; UserError where that is no label, or of two kinds."""

    def __init__(self, field: str) -> None:
        self.field, self.found = field, False
        self.names: set[str] = set()
        self.kinds: dict[str, str] = {}  # with the place where each was met first
        self.fields: list[str] = []  # of the first record

    def add(self, record: dict[str, Any], place: str) -> None:
        self.fields = self.fields or list(record)
        self.found |= self.field in record
        label = record.get(self.field)
        if label is None:
            return
        if type(label) not in _KINDS:  # not isinstance: to Python, True is an integer
            raise UserError("a label is a name or an integer, or true or false", got=f"{place}: {label!r}")
        self.kinds.setdefault(_KINDS[type(label)], f"{place}: {json.dumps(label)}")
        if len(self.kinds) > 1:
            raise UserError(
                "labels are of more than one kind, and their numbers would collide",
                got="; ".join(self.kinds.values()),
                allowed=f"only {', only '.join(_KINDS.values())}",
            )
        if isinstance(label, str):
            self.names.add(label)

    def numbers(self) -> dict[str, int]:
        """Name -> label. UserError where no record had the field."""
        if not self.found:
            raise UserError(
                "no record has the field of the labels" + did_you_mean(self.field, self.fields),
                got=f"pack.options.label={self.field}",
                allowed=", ".join(self.fields) or "none: lines of .txt have no fields",
            )
        return {name: number for number, name in enumerate(sorted(self.names))}


def _record(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError("a line is not JSON", got=f"{file}, line {number}: {error}") from None
    if not isinstance(record, dict):
        raise UserError("a line is not a JSON object", got=f"{file}, line {number}")
    return record


def _files(path: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """Split -> file, and what else lies in the folder: extension -> how many."""
    if path.is_file():
        if _format(path) is None:
            raise UserError(
                "the name of a file of texts says what its lines are",
                got=str(path),
                allowed=_ALLOWED,
                fix="call it .txt where a line is a text, .jsonl where it is a record (of an array in a .json, "
                "jq -c '.[]' makes that)",
            )
        return {"train": path}, {}
    if not path.is_dir():
        raise UserError("there are no texts here", got=str(path), allowed="a file, or a folder of one file a split")
    found = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    files = [file for file in found if _format(file)]
    splits = {file.name.partition(".")[0]: file for file in files}
    if not splits or len(splits) < len(files):
        raise UserError(
            "a folder of texts holds one file a split",
            got=f"{path}: {', '.join(file.name for file in files or found) or 'no files'}",
            allowed=_ALLOWED,
        )
    others = Counter(extension_of(file.name) or "without extension" for file in found if not _format(file))
    return splits, most_first(others)


def _format(file: Path) -> str | None:
    """`txt` or `jsonl`, by the ending before that of the compression; None for any other."""
    extension = extension_of(file.name)
    if extension in _COMPRESSED:
        extension = extension_of(file.stem)
    return extension if extension in _FORMATS else None


def _read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(its number from 1, line) of every text or record."""
    is_text = _format(file) == "txt"
    for number, line in enumerate(_read(file), 1):
        if is_text or line.strip():
            yield number, line


def _read(file: Path) -> Iterator[bytes]:
    try:
        with fsspec.open(str(file), "rb", compression="infer") as lines:
            yield from lines
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError("a file of texts cannot be read", got=f"{file}: {error}") from None
