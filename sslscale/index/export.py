"""The features of a run for other tools: what there is, and files in the forms that they read.

parquet  OUTPUT/<dataset>/part-00042.parquet   the part's table, and `vector`, a list of fixed size
npy      OUTPUT/<dataset>.npy and .parquet     one array of all rows, and their tables
lance    OUTPUT/<dataset>.lance                a Lance dataset of the same columns as parquet
viewer   OUTPUT/<dataset>.parquet              `id`, `vector` and `neighbors` {ids, distances}, ids being rows of the
                                               file: the columns that embedding-atlas reads
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sslscale import storage
from sslscale.config import RunConfig, load_config
from sslscale.errors import UserError, did_you_mean, missing_package
from sslscale.features import FeatureSet, FeatureStore, open_features
from sslscale.features.files import replacing
from sslscale.features.store import DTYPES
from sslscale.index.all_pairs import Neighbours, all_pairs
from sslscale.rundir import RunDir
from sslscale.runtime.base import Runtime

FORMATS = ("parquet", "npy", "lance", "viewer")
VIEWER_NEIGHBOURS = 15


def describe_features(run: RunDir) -> dict[str, Any]:
    """For each embedded dataset `rows, dim, dtype, normalized, parts, bytes, backbone, columns`."""
    return {
        name: {
            "rows": store.num_rows,
            "dim": store.dim,
            "dtype": store.dtype,
            "normalized": store.normalized,
            "parts": len(store.parts),
            "bytes": store.num_rows * store.dim * np.dtype(DTYPES[store.dtype]).itemsize,
            "backbone": store.backbone,
            "columns": store.schema(0).names if store.parts else [],
        }
        for name, store in open_features(run).stores.items()
    }


def export_features(
    run: RunDir, runtime: Runtime, *, format: str, output: Path, dataset: str | None = None
) -> list[Path]:
    """Writes the features of a dataset, or of all, in one of FORMATS; returns what was written.

    Raises UserError for an unknown format or dataset, where there is nothing to write, and where a file is in the way.
    All but a viewer, whose neighbours go into the run, only reads the run. Memory is that of one part.
    """
    if format not in FORMATS:
        raise UserError("unknown format", got=f"{format!r}{did_you_mean(format, FORMATS)}", allowed=", ".join(FORMATS))
    features = open_features(run, None if dataset is None else [dataset])
    write = {"parquet": _parquet, "npy": _npy, "lance": _lance}
    written: list[Path] = []
    for name, store in features.stores.items():
        if not store.parts:
            raise UserError("there are no features to export", got=name)
        if format == "viewer":
            config = load_config(str(run.path / "config.yaml"), [])
            written += _viewer(run, config, runtime, name, open_features(run, [name]), output)
        else:
            written += write[format](name, store, output)
    return written


def _parquet(name: str, store: FeatureStore, output: Path) -> list[Path]:
    paths = [_free(output / name / f"part-{part.part:05d}.parquet") for part in store.parts]
    tables = (store.table(part.part) for part in store.parts)
    for path, table in zip(paths, _with_vectors(store, tables), strict=True):
        _write_tables(path, iter([table]))
    return paths


def _npy(name: str, store: FeatureStore, output: Path) -> list[Path]:
    array, table = _free(output / f"{name}.npy"), _free(output / f"{name}.parquet")
    with replacing(array) as temporary:
        shape = (store.num_rows, store.dim)
        rows = np.lib.format.open_memmap(temporary, "w+", np.dtype(DTYPES[store.dtype]), shape)
        start = 0
        for part in store.parts:
            rows[start : start + part.rows] = store.open_block(part.part)
            start += part.rows
        rows.flush()
    _write_tables(table, _tables(store))
    return [array, table]


def _lance(name: str, store: FeatureStore, output: Path) -> list[Path]:
    try:
        import lance
    except ImportError:
        raise missing_package("pylance", "lance") from None
    path = _free(output / f"{name}.lance")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tables = _with_vectors(store, _tables(store))
    first = next(tables)
    batches = (batch for table in itertools.chain([first], tables) for batch in table.to_batches())
    try:
        lance.write_dataset(batches, str(temporary), schema=first.schema)
        temporary.rename(path)  # so that it is whole or not there
        storage.publish_tree(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return [path]


def _viewer(
    run: RunDir, config: RunConfig, runtime: Runtime, name: str, features: FeatureSet, output: Path
) -> list[Path]:
    path = _free(output / f"{name}.parquet")
    k = min(VIEWER_NEIGHBOURS, features.num_rows - 1)
    if k < 1:
        raise UserError("a viewer needs two samples", got=f"{features.num_rows} in {name}")
    found = all_pairs(
        run, config, runtime, features, k=k, metric="cosine", wanted_recall=0.95, name=f"viewer-{name}", overwrite=True
    )
    _write_tables(path, _with_neighbours(features, found, _tables(features.stores[name])))
    return [path]


def _tables(store: FeatureStore) -> Iterator[pa.Table]:
    """The table of each part, with the columns that any of them has."""
    empty = pa.unify_schemas([store.schema(part.part) for part in store.parts]).empty_table()
    for part in store.parts:
        yield pa.concat_tables([empty, store.table(part.part)], promote_options="default")


def _with_vectors(store: FeatureStore, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for part, table in zip(store.parts, tables, strict=True):
        yield table.append_column("vector", _lists(np.asarray(store.open_block(part.part))))


def _with_neighbours(features: FeatureSet, found: Neighbours, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for part, table in zip(features.parts, tables, strict=True):
        distances, ids = found.block(part.number)
        rows = features.positions(np.asarray(ids).ravel()).reshape(ids.shape)
        neighbours = pa.StructArray.from_arrays([_lists(rows), _lists(np.asarray(distances))], ["ids", "distances"])
        vector = _lists(features.block(part.number).astype(np.float32))
        renamed = table.rename_columns({"key": "id"})
        yield renamed.append_column("vector", vector).append_column("neighbors", neighbours)


def _lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _write_tables(path: Path, tables: Iterator[pa.Table]) -> None:
    """Tables of one schema as one file, holding one of them at a time."""
    first = next(tables)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _free(path: Path) -> Path:
    if storage.size(path) is not None or storage.names(path):
        raise UserError(
            "there is something at this path already", got=storage.shown(path), fix="another --output, or remove it"
        )
    return path
