"""What index/<name>/ holds; result.json names it, and what result.json does not name does not exist.

index/<name>/index.faiss   opens with faiss.read_index, which numbers vectors from 0 (layout merged and on_disk)
index/<name>/rows.npy      int64 (N,): the row id of each vector
index/<name>/shards/       shard-<hash>.faiss and .npy, the same for each group of parts (layout sharded)
index/<name>/parts.json    which dataset and part the upper half of a row id names
index/<name>/deleted*.npy  the row ids that a search leaves out
index/<name>/trained*.faiss  the empty index that all shards start from

Later states of the same index are written beside the files in use, with another name, and then named instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.errors import StageError, UserError
from sslscale.features import FeatureSet
from sslscale.features.files import open_npy
from sslscale.index.factory import Effort
from sslscale.rundir import RunDir, hash_json, read_json, write_json

ROW = 0xFFFFFFFF  # the lower half of a row id


@dataclass(frozen=True)
class IndexedPart:
    """A part of a dataset as it was indexed. Its place in the list of all is its number in the index's row ids."""

    dataset: str
    part: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class ShardFiles:
    """One faiss index and the row ids of its vectors, as paths below the index's folder, with their sizes."""

    vectors: int
    index: str
    rows: str
    sizes: dict[str, int]


@dataclass(frozen=True)
class IndexRecord:
    """A finished index, as result.json names it."""

    path: Path
    result: dict[str, Any]

    @classmethod
    def open(cls, run: RunDir, name: str) -> IndexRecord:
        """UserError if there is none; StageError (exit 1) if one of its files is not as it was written."""
        path = run.stage_path("index", name)
        again = f"sslscale index -c CONFIG --run {storage.shown(run.path)} --name {name}"
        if not (path / "result.json").is_file():
            raise UserError("this run has no such index", got=storage.shown(path), fix=again)
        record = cls(path, {}).renewed()
        for file, found, size in record.damaged():
            raise StageError(
                "a file of the index is missing or cut off",
                got=f"{path / file}: {'missing' if found is None else f'{found} bytes'}",
                allowed=f"{size} bytes, as it was written",
                fix=f"{again} builds it again, without what was deleted",
            )
        return record

    def renewed(self) -> IndexRecord:
        """What result.json says by now."""
        return IndexRecord(self.path, read_json(self.path / "result.json"))

    def damaged(self) -> list[tuple[str, int | None, int]]:
        """The files that are not as they were written: their bytes, None for those missing, and what they had."""
        sizes = {file: size for shard in self.shards for file, size in shard.sizes.items()}
        found = {file: storage.size(self.path / file) for file in sizes}
        return [(file, found[file], size) for file, size in sizes.items() if found[file] != size]

    def has_trained(self) -> bool:
        """Whether the file that shards start from is there, whole."""
        found = storage.size(self.path / self.result["trained"])
        return found is not None and found == self.result.get("trained_bytes", found)

    def updated(self, **values: Any) -> IndexRecord:
        return IndexRecord(self.path, {**self.result, **values})

    def remove_others(self) -> None:
        """Deletes the files that result.json does not name: those of an earlier state."""
        named = {self.result["parts"], self.result["trained"], self.result["deleted"]}
        named |= {file for shard in self.shards for file in shard.sizes}
        there = [*storage.names(self.path), *(f"shards/{name}" for name in storage.names(self.path / "shards"))]
        for file in there:
            ours = any(PurePosixPath(file).match(pattern) for pattern in ("*.faiss", "*.npy", "parts*.json"))
            if ours and file not in named:
                storage.remove(self.path / file)

    @property
    def shards(self) -> list[ShardFiles]:
        return [ShardFiles(**shard) for shard in self.result["shards"]]

    @property
    def effort(self) -> Effort:
        return Effort(**{name: self.result[name] for name in ("nprobe", "ef_search", "k_factor")})

    @cached_property
    def parts(self) -> list[IndexedPart]:
        return [IndexedPart(**part) for part in read_json(self.path / self.result["parts"])]

    @cached_property
    def deleted(self) -> np.ndarray:
        """The index's own row ids that are deleted, ascending."""
        file = self.result["deleted"]
        try:
            return np.empty(0, np.int64) if file is None else open_npy(self.path / file)
        except (FileNotFoundError, ValueError) as error:
            raise StageError(
                "the list of what was deleted from the index cannot be read",
                got=f"{self.path / file}: {error}",
                fix="bring the file back, or remove the folder of the index, build it and delete again",
            ) from None

    def numbers(self, features: FeatureSet) -> np.ndarray:
        """(parts,) int64: what each part of the index is called in `features`. UserError where one has changed."""
        present = {part: number for number, part in enumerate(indexed_parts(features))}
        for part in self.parts:
            if part not in present:
                raise UserError(
                    "the index was built from other features than the run has now",
                    got=f"part {part.part} of {part.dataset} is missing or has changed",
                    fix="sslscale index --overwrite builds it again",
                )
        return np.array([present[part] for part in self.parts], dtype=np.int64)


def indexed_parts(features: FeatureSet) -> list[IndexedPart]:
    """The parts of a set, in order; each is named by the hash of its rows and its table."""
    hashes = {
        (name, part.part): hash_json([part.sha256, part.table_sha256])
        for name, store in features.stores.items()
        for part in store.parts
    }
    return [IndexedPart(part.dataset, part.part, part.rows, hashes[part.dataset, part.part]) for part in features.parts]


def deletions(folder: Path) -> list[dict[str, Any]]:
    """What was deleted from the index in a folder, or is to be left out of the one that is being built there.

    `{"part": an IndexedPart as a dict, "rows": [...]}` for each part that has any.
    """
    if not (folder / "result.json").is_file():
        return read_json(carried(folder)) if storage.size(carried(folder)) is not None else []
    record = IndexRecord(folder, {}).renewed()
    numbers, starts = np.unique(record.deleted >> 32, return_index=True)
    rows = np.split(record.deleted & ROW, starts[1:])
    return [{"part": asdict(record.parts[at]), "rows": own.tolist()} for at, own in zip(numbers, rows, strict=False)]


def carried(folder: Path) -> Path:
    """Where `deletions` are noted while another index is built in the folder: beside it, as it is emptied first."""
    return folder.with_name(f".{folder.name}.deleted.json")


def located(deleted: Sequence[dict[str, Any]], parts: Sequence[IndexedPart]) -> tuple[np.ndarray, int]:
    """`deletions` as row ids of an index of `parts`, ascending; and how many of them have no place in it."""
    number_of = {part: number for number, part in enumerate(parts)}
    listed = [(number_of.get(IndexedPart(**one["part"])), one["rows"]) for one in deleted]
    here = [np.array(rows, np.int64) + (number << 32) for number, rows in listed if number is not None]
    lost = sum(len(rows) for number, rows in listed if number is None)
    return np.sort(np.concatenate([*here, np.empty(0, np.int64)])), lost


def write_parts(path: Path, parts: Sequence[IndexedPart]) -> None:
    write_json(path, [asdict(part) for part in parts])
