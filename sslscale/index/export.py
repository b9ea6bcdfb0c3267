"""The features of a run for other tools: what there is, and files in the forms that they read.

parquet  OUTPUT/<dataset>/part-00042.parquet   the part's table, and `vector`, a list of fixed size
npy      OUTPUT/<dataset>.npy and .parquet     one array of all rows, and their tables
lance    OUTPUT/<dataset>.lance                a Lance dataset of the same columns as parquet
viewer   OUTPUT/<dataset>.parquet              `id`, `vector` and `neighbors` {ids, distances}, ids being rows of the
                                               file: the columns that embedding-atlas reads
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sslscale.config import RunConfig, load_config
from sslscale.errors import UserError, did_you_mean, missing_package
from sslscale.features import FeatureSet, FeatureStore, open_features
from sslscale.features.files import replacing
from sslscale.index.all_pairs import all_pairs
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
            "bytes": sum(store.open_block(part.part).nbytes for part in store.parts),
            "backbone": store.backbone,
            "columns": store.table(0).column_names if store.parts else [],
        }
        for name, store in open_features(run).stores.items()
    }


def export_features(
    run: RunDir, runtime: Runtime, *, format: str, output: Path, dataset: str | None = None
) -> list[Path]:
    """Writes the features of a dataset, or of all, in one of FORMATS; returns what was written.

    Raises UserError for an unknown format or dataset, and where a file is in the way.
    """
    if format not in FORMATS:
        raise UserError("unknown format", got=f"{format!r}{did_you_mean(format, FORMATS)}", allowed=", ".join(FORMATS))
    features = open_features(run, None if dataset is None else [dataset])
    write = {"parquet": _parquet, "npy": _npy, "lance": _lance}
    written: list[Path] = []
    for name, store in features.stores.items():
        if format == "viewer":
            config = load_config(str(run.path / "config.yaml"), [])
            written += _viewer(run, config, runtime, name, open_features(run, [name]), output)
        else:
            written += write[format](name, store, output)
    return written


def _parquet(name: str, store: FeatureStore, output: Path) -> list[Path]:
    paths = [_free(output / name / f"part-{part.part:05d}.parquet") for part in store.parts]
    for path, table in zip(paths, _tables(store), strict=True):
        _write_table(path, table)
    return paths


def _npy(name: str, store: FeatureStore, output: Path) -> list[Path]:
    array, table = _free(output / f"{name}.npy"), _free(output / f"{name}.parquet")
    with replacing(array) as temporary:
        dtype = store.open_block(0).dtype if store.parts else np.float32
        rows = np.lib.format.open_memmap(temporary, "w+", dtype, (store.num_rows, store.dim))
        start = 0
        for part in store.parts:
            rows[start : start + part.rows] = store.open_block(part.part)
            start += part.rows
        rows.flush()
    _write_table(table, pa.concat_tables([store.table(part.part) for part in store.parts], promote_options="default"))
    return [array, table]


def _lance(name: str, store: FeatureStore, output: Path) -> list[Path]:
    try:
        import lance
    except ImportError:
        raise missing_package("pylance", "lance") from None
    path = _free(output / f"{name}.lance")
    empty = pa.unify_schemas([table.schema for table in _tables(store)]).empty_table()  # a part may lack a column
    for table in _tables(store):
        whole = pa.concat_tables([empty, table], promote_options="default")
        lance.write_dataset(whole, str(path), mode="append" if path.exists() else "create")
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
    tables = []
    for part in features.parts:
        distances, ids = found.block(part.number)
        rows = features.positions(np.asarray(ids).ravel()).reshape(ids.shape)
        neighbours = pa.StructArray.from_arrays([_lists(rows), _lists(np.asarray(distances))], ["ids", "distances"])
        table = features.stores[name].table(part.part).rename_columns({"key": "id"})
        vector = _lists(features.block(part.number).astype(np.float32))
        tables.append(table.append_column("vector", vector).append_column("neighbors", neighbours))
    _write_table(path, pa.concat_tables(tables, promote_options="default"))
    return [path]


def _tables(store: FeatureStore) -> Iterator[pa.Table]:
    for part in store.parts:
        yield store.table(part.part).append_column("vector", _lists(np.asarray(store.open_block(part.part))))


def _lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _free(path: Path) -> Path:
    if path.exists():
        raise UserError("there is something at this path already", got=str(path), fix="another --output, or remove it")
    return path
