"""The features of one dataset on disk: parts of rows, and the keys that they belong to.

    embed/<dataset>/part-00042.npy       (n, D) fp16 or fp32, C-order, memory-mappable
    embed/<dataset>/part-00042.parquet   key, shard, offset[, label][, further outputs], aligned to the rows
    embed/<dataset>/ids.npy              (3, N) uint64: both halves of hash128(key), sorted, and the row id of each
    embed/<dataset>/features.json        written last: whatever has none does not exist

A row id is `part << 32 | row`, as int64.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sslscale import storage
from sslscale.errors import UserError
from sslscale.features.files import open_npy, replacing, write_npy
from sslscale.rundir import hash_file, hash_json, read_json, write_json

FORMAT_VERSION = 2
DTYPES = {"fp16": np.float16, "fp32": np.float32}
ROW_GROUP = 4096  # rows that one look-up by row id has to decode
SORTED_ROWS = 2**20  # of the id table that are sorted at a time; more where there are more than 256 times as many


def row_id(part: int, row: Any) -> Any:
    """`part << 32 | row`; `row` may be an array of int64."""
    return (part << 32) | row


def part_name(part: int) -> str:
    return f"part-{part:05d}"


@dataclass(frozen=True)
class StoredPart:
    """One part of a store, as features.json names it."""

    part: int
    rows: int
    sha256: str
    table_sha256: str


class FeatureStore:
    """The features of one dataset. Made part by part (`create`, `write_part`, `commit`), then read (`open`)."""

    def __init__(
        self, path: Path, *, dim: int, dtype: str, normalized: bool, backbone: str, parts: Sequence[StoredPart] = ()
    ) -> None:
        self.path, self.dim, self.dtype, self.normalized, self.backbone = path, dim, dtype, normalized, backbone
        self.parts = tuple(parts)

    @classmethod
    def create(cls, path: str | Path, *, dim: int, dtype: str, normalized: bool, backbone: str) -> FeatureStore:
        """A store to be written. Several processes may create the same one and write different parts.

        `dtype` is "fp16" or "fp32"; `backbone` is the hash of what made the features.
        """
        assert dtype in DTYPES, dtype
        Path(path).mkdir(parents=True, exist_ok=True)
        return cls(Path(path), dim=dim, dtype=dtype, normalized=normalized, backbone=backbone)

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """A committed store; UserError if there is none or its format is another."""
        record = read_json(Path(path) / "features.json")
        if record["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} was written in another format",
                got=record["format_version"],
                allowed=FORMAT_VERSION,
                fix="embed again",
            )
        settings = {name: record[name] for name in ("dim", "dtype", "normalized", "backbone")}
        return cls(Path(path), **settings, parts=[StoredPart(**part) for part in record["parts"]])

    @property
    def num_rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def identity(self) -> str:
        """Hash of all that a reader could see: settings, and every part's rows and table."""
        return hash_json(self._record())

    def _record(self) -> dict[str, Any]:
        settings = {"dim": self.dim, "dtype": self.dtype, "normalized": self.normalized, "backbone": self.backbone}
        return {**settings, "parts": [asdict(part) for part in self.parts]}

    # -------------------------------------------------------------- writing

    def write_part(
        self,
        part: int,
        features: np.ndarray,
        keys: Sequence[str],
        shards: Sequence[str],
        offsets: Sequence[int],
        labels: Sequence[int | None] | None = None,
        metadata: Mapping[str, np.ndarray | pa.Array] | None = None,
    ) -> dict[str, Any]:
        """Writes one part, each of its two files atomically, and returns its record for `commit`.

        `features` is (n, D) and finite after the cast to the store's dtype; `shards` and `offsets` say where each
        sample's record starts. `metadata` holds further columns: arrays (n,) or (n, m), or a column of Arrow's.
        """
        rows = np.asarray(features, dtype=DTYPES[self.dtype])
        assert rows.shape == (len(keys), self.dim), (rows.shape, len(keys), self.dim)
        assert np.isfinite(rows).all(), "non-finite rows are failures of embed and never enter the store"
        columns: dict[str, pa.Array] = {
            "key": pa.array(keys, pa.string()),
            "shard": pa.array(shards, pa.string()),
            "offset": pa.array(offsets, pa.int64()),
        }
        if labels is not None:
            columns["label"] = pa.array(labels, pa.int64())
        columns |= {name: _column(values) for name, values in (metadata or {}).items()}
        array, table = self._path(part, ".npy"), self._path(part, ".parquet")
        write_npy(array, rows)
        with replacing(table) as temporary:
            pq.write_table(pa.table(columns), temporary, row_group_size=ROW_GROUP)
        return asdict(StoredPart(part, len(rows), hash_file(array), hash_file(table)))

    def part_files(self, part: int) -> tuple[Path, Path]:
        """The two files of a part: its rows and its table."""
        return self._path(part, ".npy"), self._path(part, ".parquet")

    def commit(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Makes the parts whose records these are (0 .. P-1, any order) the store: the id table, then features.json."""
        self.parts = tuple(sorted((StoredPart(**record) for record in records), key=lambda part: part.part))
        assert [part.part for part in self.parts] == list(range(len(self.parts))), "parts are numbered without gaps"
        self._write_ids()
        counts = {"format_version": FORMAT_VERSION, "num_rows": self.num_rows}
        write_json(self.path / "features.json", {**counts, **self._record()})

    def _write_ids(self) -> None:
        """ids.npy: uint64 (3, N), two hashes of each key and its row id, by the first hash.

        Rows go to files by the first bits of that, and from each, sorted, to their place: memory is that of one file.
        """
        bits = min(8, max(0, math.ceil(math.log2(max(self.num_rows, 1) / SORTED_ROWS))))
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path / "ids.npy"))
            files = [stack.enter_context(tempfile.TemporaryFile(dir=self.path)) for _ in range(2**bits)]
            for part in self.parts:
                keys = self.table(part.part, ["key"]).column("key").to_pylist()
                rows = np.stack([*hash_keys(keys), row_id(part.part, np.arange(part.rows)).astype(np.uint64)], axis=1)
                first = (rows[:, 0] >> np.uint64(56)) >> np.uint64(8 - bits)
                for number, file in enumerate(files):
                    file.write(rows[first == number].tobytes())
            shape = (3, self.num_rows)
            ids = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=shape)
            start = 0
            for file in files:
                file.seek(0)
                rows = np.frombuffer(file.read(), dtype=np.uint64).reshape(-1, 3)
                ids[:, start : start + len(rows)] = rows[np.argsort(rows[:, 0], kind="stable")].T
                start += len(rows)
            ids.flush()

    # -------------------------------------------------------------- reading

    def open_block(self, part: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a part, (n, D), memory-mapped read-only."""
        return open_npy(self._path(part, ".npy"))[start:stop]

    def table(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The part's table, aligned to its rows."""
        return pq.read_table(self._table(part), columns=None if columns is None else list(columns))

    def schema(self, part: int) -> pa.Schema:
        """The columns of the part's table."""
        return pq.read_schema(self._table(part))

    def take_table(self, part: int, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The given rows of a part's table, in the given order; decodes only the row groups that hold them."""
        groups, group_of = np.unique(rows // ROW_GROUP, return_inverse=True)
        with pq.ParquetFile(self._table(part)) as file:
            table = file.read_row_groups(groups.tolist(), columns=list(columns))
        return table.take(group_of * ROW_GROUP + rows % ROW_GROUP)

    def part_labels(self, part: int) -> np.ndarray | None:
        """int64 (n,) of one part; None if any row lacks a label: a part without rows lacks none."""
        found = pq.read_metadata(self._table(part))
        if not found.num_rows:
            return np.zeros(0, dtype=np.int64)
        if "label" not in found.schema.to_arrow_schema().names:
            return None
        column = self.table(part, ["label"]).column("label")
        return None if column.null_count else column.to_numpy()

    def check_column(self, part: int, name: str) -> None:
        """UserError where the features were made without this further output."""
        columns = self.schema(part).names
        if name not in columns:
            raise UserError(
                f"the objective that made these features gives no {name}",
                got=f"{self.path}: {', '.join(columns)}",
                fix="pretrain with an objective that gives it, or set another method",
            )

    def part_column(self, part: int, name: str) -> np.ndarray:
        """A further output of one part, (n,) or (n, m); UserError where there is none."""
        self.check_column(part, name)
        column = self.table(part, [name]).column(name).combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            return column.flatten().to_numpy().reshape(len(column), -1)
        return column.to_numpy()

    def labels(self) -> np.ndarray | None:
        """int64 (N,) in part order; None if any row lacks a label."""
        labels = [np.zeros(0, dtype=np.int64)]
        for part in self.parts:
            own = self.part_labels(part.part)
            if own is None:
                return None
            labels.append(own)
        return np.concatenate(labels)

    def find(self, key: str) -> list[int]:
        """The row ids of a key: none, one, or several where shards repeat it.

        128 bits of a cryptographic hash stand for the key: no part's table needs to be opened to compare it. The id
        table may be a newer one than this: what it knows of parts that came later does not count.
        """
        high, low, ids = self._ids
        (wanted,), (rest,) = hash_keys([key])
        start, stop = np.searchsorted(high, wanted, "left"), np.searchsorted(high, wanted, "right")
        found = ids[start:stop][low[start:stop] == rest].astype(np.int64)
        return found[found >> 32 < len(self.parts)].tolist()

    @cached_property
    def _ids(self) -> np.ndarray:
        return open_npy(self.path / "ids.npy")

    def lookup(self, keys: Sequence[str]) -> np.ndarray:
        """Row ids, int64 (n,), of keys; UserError for a key that names no row or several."""
        found = [self.find(key) for key in keys]
        for key, ids in zip(keys, found, strict=True):
            if len(ids) != 1:
                what = "there is no sample with this key" if not ids else "several samples have this key"
                raise UserError(what, got=f"{key!r} in {self.path}", allowed=self._example_key())
        return np.array([ids[0] for ids in found], dtype=np.int64)

    def key_of(self, row: int) -> str:
        table = self.take_table(row >> 32, np.array([row & 0xFFFFFFFF]), ["key"])
        return table.column("key")[0].as_py()

    def _example_key(self) -> str | None:
        first = next((part for part in self.parts if part.rows), None)
        return None if first is None else f"keys such as {self.key_of(row_id(first.part, 0))!r}"

    def _table(self, part: int) -> Path:
        return storage.bring(self._path(part, ".parquet"))

    def _path(self, part: int, suffix: str) -> Path:
        return self.path / (part_name(part) + suffix)


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """128-bit BLAKE2b of each key as two halves, the first one first: uint64 (2, n)."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2).T


def _column(values: np.ndarray | pa.Array) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    values = np.asarray(values)
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
