"""Datasets that are read as one: the union of several feature stores, and the one that a run has embedded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.errors import UserError, did_you_mean
from sslscale.features.store import DTYPES, FeatureStore, part_name
from sslscale.rundir import RunDir, hash_json, read_json


@dataclass(frozen=True)
class PartRef:
    """A part of a set: its number in the set, and the dataset's own part that it is."""

    number: int
    dataset: str
    part: int
    rows: int

    @property
    def file(self) -> str:
        """Where outputs aligned to the part go, below a stage's folder: `<dataset>/part-00042.npy`."""
        return f"{self.dataset}/{part_name(self.part)}.npy"


class FeatureSet:
    """Datasets in order, with their parts numbered consecutively, so that row ids are unique over the set.

    Raises UserError where backbone, dimension or normalisation differ.
    """

    def __init__(self, stores: Mapping[str, FeatureStore]) -> None:
        assert stores, "a set has at least one dataset"
        self.stores = dict(stores)
        own = [(name, part) for name, store in self.stores.items() for part in store.parts]
        self.parts = [PartRef(number, name, part.part, part.rows) for number, (name, part) in enumerate(own)]
        self._starts = np.cumsum([0, *(part.rows for part in self.parts)])
        self.check_comparable(self)

    @classmethod
    def open(cls, paths: Mapping[str, str]) -> FeatureSet:
        """The set at `paths`, as the property of that name gave them: how a worker opens what its driver has open."""
        return cls({name: FeatureStore.open(path) for name, path in paths.items()})

    @property
    def paths(self) -> dict[str, str]:
        return {name: str(store.path) for name, store in self.stores.items()}

    @property
    def _first(self) -> FeatureStore:
        return next(iter(self.stores.values()))

    @property
    def dim(self) -> int:
        return self._first.dim

    @property
    def backbone(self) -> str:
        return self._first.backbone

    @property
    def dtype(self) -> np.dtype:
        """What holds the rows of every store: the widest stored dtype."""
        return np.result_type(*(DTYPES[store.dtype] for store in self.stores.values()))

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def identity(self) -> str:
        return hash_json([[name, store.identity] for name, store in self.stores.items()])

    @property
    def slices(self) -> dict[str, slice]:
        """Where each dataset's rows lie in arrays over the whole set, in part order."""
        slices, start = {}, 0
        for name, store in self.stores.items():
            slices[name] = slice(start, start + store.num_rows)
            start += store.num_rows
        return slices

    def check_comparable(self, other: FeatureSet) -> None:
        """Raises UserError unless all stores of both have one backbone, dimension and normalisation."""
        expected = self._first
        for name, store in other.stores.items():
            for field in ("backbone", "dim", "normalized"):
                if getattr(store, field) != getattr(expected, field):
                    first = next(iter(self.stores))
                    raise UserError(
                        "features of different kinds cannot be compared",
                        got=f"{field}: {first} has {getattr(expected, field)!r}, {name} has {getattr(store, field)!r}",
                        allowed="datasets embedded by one backbone with the same settings",
                        fix="embed them again with one config, or name the datasets to use",
                    )

    def block(self, number: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of part `number` of the set, (n, D), memory-mapped read-only."""
        part = self.parts[number]
        return self.stores[part.dataset].open_block(part.part, start, stop)

    def check_column(self, name: str) -> None:
        """UserError where features of a dataset were made without this further output."""
        for store in self.stores.values():
            with_rows = next((part.part for part in store.parts if part.rows), None)
            if with_rows is not None:
                store.check_column(with_rows, name)

    def column(self, number: int, name: str) -> np.ndarray:
        """A further output of part `number`, (n,) or (n, m); UserError where its features were made without one."""
        part = self.parts[number]
        return self.stores[part.dataset].part_column(part.part, name)

    def labels(self, dataset: str | None = None) -> np.ndarray | None:
        """int64 (N,) in part order, of one dataset or of all; None if any row lacks a label."""
        stores = self.stores.values() if dataset is None else [self.stores[dataset]]
        labels = [store.labels() for store in stores]
        return (
            None
            if any(part is None for part in labels)
            else np.concatenate([part for part in labels if part is not None])
        )

    def row_ids(self, positions: np.ndarray) -> np.ndarray:
        """Row ids, int64 (n,), of positions 0 .. N-1 in part order."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        return numbers.astype(np.int64) << 32 | (positions - self._starts[numbers])

    def positions(self, row_ids: np.ndarray) -> np.ndarray:
        """The inverse of `row_ids`: int64 (n,)."""
        return self._starts[row_ids >> 32] + (row_ids & 0xFFFFFFFF)

    def take(self, row_ids: np.ndarray) -> np.ndarray:
        """The features of rows, (n, D), in the given order."""
        rows = np.empty((len(row_ids), self.dim), dtype=self.dtype)
        for number, here in self._by_part(row_ids):
            rows[here] = self.block(number)[row_ids[here] & 0xFFFFFFFF]
        return rows

    def records(self, row_ids: np.ndarray, columns: Sequence[str] = ("key", "shard", "offset")) -> list[dict[str, Any]]:
        """`{"dataset", *columns}` of rows, in the given order."""
        records: list[dict[str, Any]] = [{} for _ in row_ids]
        for number, here in self._by_part(row_ids):
            part = self.parts[number]
            table = self.stores[part.dataset].take_table(part.part, row_ids[here] & 0xFFFFFFFF, columns)
            for index, record in zip(here, table.to_pylist(), strict=True):
                records[index] = {"dataset": part.dataset, **record}
        return records

    def keys_of(self, row_ids: np.ndarray) -> list[str]:
        return [record["key"] for record in self.records(row_ids, ["key"])]

    def lookup(self, key: str, dataset: str | None = None) -> int:
        """The row id of a key, in one dataset or in all; UserError if it names no row or several."""
        if dataset is not None and dataset not in self.stores:
            raise UserError("there is no such dataset", got=dataset, allowed=", ".join(self.stores))
        names = list(self.stores) if dataset is None else [dataset]
        holders = [name for name in names if self.stores[name].find(key)]
        if len(holders) > 1:
            raise UserError(
                "several datasets have a sample with this key", got=key, allowed=", ".join(holders), fix="name one"
            )
        name = holders[0] if holders else names[0]
        own = int(self.stores[name].lookup([key])[0])  # raises where the key is unknown or repeated
        first = next(part.number for part in self.parts if part.dataset == name)
        return own + (first << 32)  # a store's parts follow each other in the set

    def _by_part(self, row_ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        numbers = row_ids >> 32
        return ((int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers))


def sample_positions(num_rows: int, size: int, seed: int) -> np.ndarray:
    """`min(size, num_rows)` distinct positions below `num_rows`, ascending, int64."""
    if size >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False, shuffle=False))


def open_features(run: RunDir, datasets: Sequence[str] | None = None) -> FeatureSet:
    """The features that a run has embedded: of `datasets`, in that order, or of every embedded dataset by name.

    Raises UserError where there are none, where their kinds differ, or where they were made by another backbone than
    the one that the run's own pretraining exported.
    """
    folder, embedded = run.stage_path("embed"), embedded_datasets(run)
    if not embedded:
        where = storage.shown(run.path)
        fix = f"sslscale embed -c CONFIG --run {shlex.quote(where)}"
        raise UserError("this run has no features", got=where, fix=fix)
    check_embedded(datasets or (), embedded)
    features = FeatureSet({name: FeatureStore.open(folder / name) for name in datasets or embedded})
    for name, store in features.stores.items():
        _check_backbone(run, name, store)
    return features


def embedded_datasets(run: RunDir) -> list[str]:
    """The datasets whose features a run has, by name."""
    return sorted(path.parent.name for path in run.stage_path("embed").glob("*/features.json"))


def check_embedded(datasets: Sequence[str], embedded: Sequence[str]) -> None:
    """UserError for one of `datasets` that is none of those `embedded`."""
    for name in datasets:
        if name not in embedded:
            raise UserError(
                "this dataset is not embedded",
                got=f"{name!r}{did_you_mean(name, embedded)}",
                allowed=", ".join(embedded),
                fix="add it to embed.datasets and run embed",
            )


def _check_backbone(run: RunDir, dataset: str, store: FeatureStore) -> None:
    """Refuses features that embed made by the run's own backbone, when they or that backbone are others by now."""
    exported = run.stage_path("pretrain") / "backbone"
    result = run.stage_path("embed", dataset) / "result.json"
    if not (exported.is_dir() and result.is_file()):
        return
    made_by = read_json(result)["backbone"]
    if made_by["name"] != "pretrain":
        return
    current = read_json(exported / "backbone.json")["sha256"]
    if made_by["weights"] != current or made_by["sha256"] != store.backbone:
        raise UserError(
            f"the features of {dataset} were made by another backbone than this run's",
            got=f"{store.backbone}, of weights {made_by['weights']}",
            allowed=f"{made_by['sha256']}, of weights {current}",
            fix=f"sslscale embed -c CONFIG --run {shlex.quote(storage.shown(run.path))} --overwrite",
        )
