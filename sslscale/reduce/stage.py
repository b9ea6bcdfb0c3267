"""`sslscale reduce`: what compression keeps of the features, and a map of a sample of them.

reduce/<name>/codecs/<method>.faiss   trained and empty: faiss.read_index, then sa_encode and sa_decode; under "cosine"
                                      they are of rows of unit length
reduce/<name>/map.npy                 (m, 2) fp32
reduce/<name>/map_rows.npy            (m,) int64, the row ids of the map's points
reduce/<name>/result.json             `num_vectors`, and `rows` of them that codes are trained and measured on, with so
                                      many `queries` and `candidates` by `metric`; `table`: one line a method; `map`:
                                      its method and number of points
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from sslscale.config import ReduceConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features, sample_positions
from sslscale.features.distance import prepare
from sslscale.features.files import replacing, write_npy
from sslscale.reduce.compress import codecs, empty_codec, measure, neighbours
from sslscale.reduce.maps import check_method, two_dimensions
from sslscale.rundir import RunDir, Stage
from sslscale.runtime.base import Runtime, compute_threads
from sslscale.runtime.progress import Progress

PQ_CENTROIDS = 256  # of a sub-quantizer: so many rows its training needs at least


def run_reduce(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Measures the compression of `config.reduce.datasets` and maps a sample; returns result.json.

    A config without the section has its defaults: it is for `run` that the section has to be asked for. It runs in this
    process, on a bounded sample: `runtime` is part of every stage's signature.
    """
    settings = config.reduce or ReduceConfig()
    features = open_features(run, settings.datasets)
    _check(settings, features)
    threads = config.runtime.threads
    stage = run.open_stage(
        "reduce",
        name,
        {**settings.identity(), "seed": config.seed, "threads": threads},
        {"features": features.identity},
        overwrite=overwrite,
    )
    if stage.done:
        return stage.result
    with compute_threads(threads):
        table = _table(stage, settings, config.seed, features)
        mapped = None if settings.map is None else _map(stage, settings, config.seed, features)
    rows = min(settings.rows, features.num_rows)
    sampled = {"rows": rows, "queries": min(settings.queries, rows), "candidates": settings.candidates}
    counts = {"num_vectors": features.num_rows, "dim": features.dim, "metric": settings.metric, **sampled}
    return stage.finish({**counts, "table": table, "map": mapped})


def _check(settings: ReduceConfig, features: FeatureSet) -> None:
    check_method(settings.map)
    if min(settings.rows, features.num_rows) < PQ_CENTROIDS:
        raise UserError(
            "too few vectors to train codes on",
            got=f"{features.num_rows} vectors, reduce.rows={settings.rows}",
            allowed=f"at least {PQ_CENTROIDS} of both",
        )


def _table(stage: Stage, settings: ReduceConfig, seed: int, features: FeatureSet) -> list[dict[str, Any]]:
    x = _rows(features, sample_positions(features.num_rows, settings.rows, seed), settings.metric)
    at = sample_positions(len(x), settings.queries, seed)
    truth = neighbours(x, at)
    methods = codecs(features.dim, settings.code_bytes, settings.pca_dims)
    table = [{"method": "fp32", "factory": "Flat", "bytes_per_vector": 4 * features.dim, **_lossless()}]
    with Progress("reduce", total=len(methods), unit="codecs") as progress:
        for method, factory in methods.items():
            codec = empty_codec(factory, features.dim)
            codec.train(x)
            path = stage.path / "codecs" / f"{method}.faiss"
            with replacing(path) as temporary:
                faiss.write_index(codec, str(temporary))
            table.append({"method": method, "factory": factory, **measure(codec, x, at, truth, settings.candidates)})
            progress.advance()
    return table


def _lossless() -> dict[str, float]:
    return {"reconstruction_error": 0.0, "recall_at_10": 1.0, "recall_at_10_reranked": 1.0}


def _map(stage: Stage, settings: ReduceConfig, seed: int, features: FeatureSet) -> dict[str, Any]:
    """Every dataset gives its share of the points."""
    share = min(1.0, settings.map_rows / features.num_rows)
    positions = np.concatenate(
        [
            here.start + sample_positions(here.stop - here.start, round(share * (here.stop - here.start)), seed)
            for here in features.slices.values()
        ]
    )
    assert settings.map is not None
    x = _rows(features, positions, settings.metric)
    write_npy(stage.path / "map.npy", two_dimensions(x, settings.map, settings.metric, seed))
    write_npy(stage.path / "map_rows.npy", features.row_ids(positions))
    return {"method": settings.map, "num_points": len(positions)}


def _rows(features: FeatureSet, positions: np.ndarray, metric: str) -> np.ndarray:
    rows = features.take(features.row_ids(positions))
    return np.ascontiguousarray(prepare(rows, metric), dtype=np.float32)
