"""`sslscale search`: queries by key, by image, as vectors, or as whole shards; images pass the run's own backbone."""

from __future__ import annotations

import contextlib
import json
import tarfile
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sslscale import storage
from sslscale.config import EmbedConfig, RunConfig
from sslscale.config.load import read_sections
from sslscale.embed.stage import embed_dataset
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.features.files import replacing
from sslscale.index.search import Index
from sslscale.models.load import EmbedderSpec
from sslscale.rundir import RunDir, discard, read_json
from sslscale.runtime.base import Runtime, make_runtime

QUERIES = "queries"  # the dataset that images to be searched with are embedded as
BATCH = 163840  # neighbours looked for at a time, of all queries together


def run_search(
    run: RunDir,
    *,
    key: str | None = None,
    query: Path | None = None,
    k: int = 10,
    where: str | None = None,
    name: str = "main",
    dataset: str | None = None,
) -> list[dict[str, Any]]:
    """The k nearest samples, nearest first: `{"query", "key", "dataset", "distance"}`.

    The query is an indexed sample, itself left out (its `key`; `dataset` says which one is meant where several have
    it), or a file: an image, or vectors (n, D) in a .npy file. UserError for an unknown key or an unreadable file.
    """
    if (key is None) == (query is None):
        raise UserError("give either a key or a file to search with", fix="--key KEY or --query FILE")
    index = Index.open(run, name)
    if key is not None:
        return _by_key(index, key, dataset, k, where)
    assert query is not None
    if query.suffix == ".npy":
        x, backbone = _vectors(query), None
        names: list[Any] = list(range(len(x)))
    else:
        x, backbone = _embedded_image(run, index, query)
        names = [query.name]
    distances, ids = index.search(x, k, where=where, backbone=backbone)
    return list(_rows(index.features, names, distances, ids))


def _by_key(index: Index, key: str, dataset: str | None, k: int, where: str | None) -> list[dict[str, Any]]:
    own = index.features.lookup(key, dataset)
    x = index.features.take(np.array([own]))
    distances, ids = index.search(x, k, where=where)
    if own in ids:
        others = index.num_kept(where) - 1
        if k > others:
            raise UserError("k is above the number of vectors beside the query", got=k, allowed=f"1 to {others}")
        distances, ids = index.search(x, k + 1, where=where)
    others = ids[0] != own
    return list(_rows(index.features, [key], distances[:, others][:, :k], ids[:, others][:, :k]))


def _rows(features: FeatureSet, names: list[Any], distances: np.ndarray, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    queries, places = np.nonzero(ids >= 0)
    records = features.records(ids[queries, places], ["key"])
    for query, place, record in zip(queries, places, records, strict=True):
        yield {
            "query": names[query],
            "key": record["key"],
            "dataset": record["dataset"],
            "distance": float(distances[query, place]),
        }


def _vectors(file: Path) -> np.ndarray:
    try:
        x = np.atleast_2d(np.load(file, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError("the file of query vectors cannot be read", got=f"{file}: {error}") from None
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
        raise UserError("query vectors are no table of floats", got=f"{file}: {x.dtype} {x.shape}", allowed="(n, D)")
    return x


# ------------------------------------------------------------------ images


def _embedded_image(run: RunDir, index: Index, image: Path) -> tuple[np.ndarray, str]:
    """The features (1, D) of an image file, and the hash of the backbone that made them."""
    if not image.is_file():
        raise UserError("there is no such file", got=str(image))
    with tempfile.TemporaryDirectory(prefix="sslscale-") as scratch:
        shards, theirs = Path(scratch, "shards"), Path(scratch, "run")
        shards.mkdir()
        with tarfile.open(shards / "query.tar", "w") as tar:
            tar.add(image, arcname=f"query{image.suffix.lower() or '.jpg'}")  # read by content, whatever it is called
        features, _ = _embedded(run, index, str(shards), theirs, make_runtime("local"), workers=1)
        if not features.num_rows:
            (failed,) = theirs.glob(f"embed/{QUERIES}/failed/*.jsonl")
            raise UserError(
                "the query image cannot be read", got=f"{image}: {json.loads(failed.read_text())['reason']}"
            )
        return features.take(features.row_ids(np.arange(1))), features.backbone


def _embedded(
    run: RunDir, index: Index, shards: str, scratch: str | Path, runtime: Runtime, workers: int
) -> tuple[FeatureSet, int]:
    """The features of `shards`, made as the indexed ones were, and how many samples could not be read."""
    made = run.stage_path("embed", next(iter(index.features.stores)))
    settings = read_json(made / "stage.json")["settings"]
    embed = {name: settings[name] for name in EmbedConfig.model_fields.keys() & settings.keys()}
    kept = storage.bring(run.path / "config.yaml")
    config = RunConfig.model_validate(
        {
            "run": str(scratch),
            "storage": (read_sections(kept).get("storage") if kept.is_file() else None) or {},
            "datasets": {QUERIES: shards},
            "embed": {**embed, "datasets": [QUERIES], "max_failed_share": 1.0},
            "runtime": {"workers": workers, "threads": settings["threads"]},
        }
    )
    with RunDir(scratch) as theirs:
        result = embed_dataset(theirs, config, runtime, QUERIES, _embedder(run, made))
        return open_features(theirs, [QUERIES]), result["failed"]


@contextlib.contextmanager
def _scratch(run: RunDir, runtime: Runtime) -> Iterator[str]:
    """The location of a run for queries: on this machine, or, where workers may be on others, within the run's own."""
    if runtime.name == "local":
        with tempfile.TemporaryDirectory(prefix="sslscale-") as folder:
            yield str(Path(folder, "run"))
        return
    location = f"{storage.shown(run.path)}/{QUERIES}-{uuid.uuid4().hex}"
    try:
        yield location
    finally:
        discard(storage.local_path(location))


def _embedder(run: RunDir, made: Path) -> EmbedderSpec:
    """What made the features in `made`; its files are where this run has them, wherever that was moved to."""
    record = read_json(made / "result.json")["backbone"]
    spec = EmbedderSpec(**{field.name: record[field.name] for field in fields(EmbedderSpec)})
    if spec.name == "pretrain":
        spec = replace(spec, location=str(run.stage_path("pretrain") / "backbone"))
    if spec.projection is not None:
        spec = replace(spec, projection=str(run.stage_path("projection") / "projection.npy"))
    return spec


def search_shards(
    run: RunDir,
    runtime: Runtime,
    *,
    queries: str,
    output: Path,
    k: int = 10,
    where: str | None = None,
    name: str = "main",
    workers: int = 1,
) -> dict[str, Any]:
    """Searches with every sample of `queries` (shards); writes a Parquet table with a row for each neighbour.

    Its columns: query (the sample's key), rank (0 is nearest), key, dataset, distance. Returns what was counted:
    samples that cannot be read, or have no direction under "cosine", are `failed` and have no rows.
    """
    index = Index.open(run, name)
    index.check_k(k, where)
    schema = pa.schema(
        {"query": pa.string(), "rank": pa.int32(), "key": pa.string(), "dataset": pa.string(), "distance": pa.float32()}
    )
    with _scratch(run, runtime) as scratch, replacing(output) as temporary:
        features, failed = _embedded(run, index, queries, scratch, runtime, workers)
        searched = 0
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, features.num_rows, step := max(1, BATCH // k)):
                own = features.row_ids(np.arange(start, min(start + step, features.num_rows)))
                x = features.take(own)
                usable = index.has_place(x)
                failed += int((~usable).sum())
                own, x = own[usable], x[usable]
                if not len(own):
                    continue
                found = index.search(x, k, where=where, backbone=features.backbone)
                rows = list(_rows(index.features, features.keys_of(own), *found))
                ranks = np.nonzero(found[1] >= 0)[1]
                columns = {name: [row[name] for row in rows] for name in schema.names if name != "rank"}
                writer.write_table(pa.table({**columns, "rank": ranks.astype(np.int32)}, schema=schema))
                searched += len(own)
    return {"queries": searched, "failed": failed, "k": k, "output": storage.shown(output)}
