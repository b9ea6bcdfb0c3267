"""Texts in files: one a line, or JSONL with a text field and an optional label field; plain, .gz, .bz2 or .xz.

A folder holds one file a split (`train.jsonl.gz`, `test.jsonl.gz`); a single file is the split `train`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from sslscale.errors import UserError
from sslscale.shards.sources import Example

_COMPRESSED = ("", ".gz", ".bz2", ".xz")
_FORMATS = (".txt", ".jsonl")


class Text:
    """Reads a file forward, whatever its size: a worker's shards come in order, so it goes through the file once.

    A line is a text, an empty one too: it then fails where it is read, with its number. Labels that are no integers
    are numbered by their sorted names, over all splits, and the name goes into the sample's metadata.
    """

    def __init__(self, path: str | None = None, *, text: str = "text", label: str | None = None) -> None:
        if path is None:
            raise UserError("text needs the file of the texts, or a folder of one a split", fix="pack.path=FILE")
        self.field, self.label_field = text, label
        self.files = _files(Path(path).expanduser())
        self._lines: dict[str, tuple[int, Iterator[bytes]]] = {}
        self.splits: dict[str, int] = {}
        names: set[str] = set()
        digest = hashlib.sha256(json.dumps([text, label]).encode())
        for split, file in self.files.items():
            count = 0
            for line in _read(file):
                digest.update(line)
                if label is not None and isinstance(found := self._record(file, count, line).get(label), str):
                    names.add(found)
                count += 1
            self.splits[split] = count
        self.numbers = {name: number for number, name in enumerate(sorted(names))}
        self.fingerprint = digest.hexdigest()

    def example(self, split: str, index: int) -> Example:
        line, file = self._line(split, index), self.files[split]
        if ".jsonl" not in file.suffixes:
            return Example(line.rstrip(b"\r\n"), extension="txt")
        record = self._record(file, index, line)
        if not isinstance(record.get(self.field), str):
            raise UserError(
                f"a record has no text in {self.field!r}",
                got=f"{file}, line {index + 1}: {', '.join(record)}",
                fix="pack.options.text=FIELD",
            )
        label = None if self.label_field is None else record.get(self.label_field)
        name = {"class": label} if isinstance(label, str) else {}
        number = self.numbers[label] if isinstance(label, str) else label
        if not isinstance(number, int | None):
            raise UserError("a label is a name or an integer", got=f"{file}, line {index + 1}: {label!r}")
        return Example(record[self.field].encode("utf-8", "surrogatepass"), number, "txt", name)

    def _line(self, split: str, index: int) -> bytes:
        at, lines = self._lines.get(split, (0, iter(())))
        if at == 0 or at > index:
            at, lines = 0, _read(self.files[split])
        for _ in range(index - at):
            next(lines)
        self._lines[split] = index + 1, lines
        return next(lines)

    @staticmethod
    def _record(file: Path, index: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError("a line is not JSON", got=f"{file}, line {index + 1}: {error}") from None
        if not isinstance(record, dict):
            raise UserError("a line is not a JSON object", got=f"{file}, line {index + 1}")
        return record


def _files(path: Path) -> dict[str, Path]:
    """Split -> file."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise UserError("there are no texts here", got=str(path), allowed="a file, or a folder of one file a split")
    files = [file for file in sorted(path.iterdir()) if _format(file) and not file.name.startswith(".")]
    splits = {file.name.partition(".")[0]: file for file in files}
    if not splits or len(splits) < len(files):
        raise UserError(
            "a folder of texts holds one file a split",
            got=f"{path}: {', '.join(file.name for file in files) or 'no files'}",
            allowed="NAME.txt or NAME.jsonl, plain or with .gz, .bz2 or .xz",
        )
    return splits


def _format(file: Path) -> bool:
    suffixes = file.suffixes
    return bool(suffixes) and (suffixes[0] in _FORMATS) and "".join(suffixes[1:]) in _COMPRESSED


def _read(file: Path) -> Iterator[bytes]:
    try:
        with fsspec.open(str(file), "rb", compression="infer") as lines:
            yield from lines
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError("a file of texts cannot be read", got=f"{file}: {error}") from None
