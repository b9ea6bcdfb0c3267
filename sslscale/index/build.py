"""`sslscale index`: a FAISS index over the features of a run.

index/<name>/index.faiss   opens with faiss.read_index; its ids are row ids
index/<name>/parts.json    which dataset and part a row id's upper half names
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import faiss
import numpy as np

from sslscale.config import IndexConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features, sample_positions
from sslscale.features.distance import prepare
from sslscale.features.files import replacing
from sslscale.index.exact import SetReference, exact_knn
from sslscale.index.plan import choose_factory, estimate_bytes
from sslscale.rundir import RunDir, Stage, write_json
from sslscale.runtime.base import Runtime, compute_threads
from sslscale.runtime.progress import Progress

WANTED_RECALL = 0.95  # what nprobe is raised to reach, where the config leaves it open


def run_index(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Builds the index of `config.index.datasets` and measures it; returns result.json.

    It is built in this process: `runtime` is part of every stage's signature.
    """
    settings = config.index
    if settings is None:
        raise UserError("the config has no section 'index'", fix="add one, or leave this stage out")
    features = open_features(run, settings.datasets)
    factory = choose_factory(features.num_rows, features.dim) if settings.factory == "auto" else settings.factory
    index = _empty_index(factory, features.dim, settings.metric)
    _check_training_rows(index, factory, min(settings.train_rows, features.num_rows))
    threads = config.runtime.threads
    stage = run.open_stage(
        "index",
        name,
        {**settings.identity(), "seed": config.seed, "threads": threads},
        {"features": features.identity, "backbone": features.backbone},
        overwrite=overwrite,
    )
    if stage.done:
        return stage.result
    with compute_threads(threads):
        result = _build(stage, settings, config.seed, features, factory, index)
    return stage.finish(result)


def _build(
    stage: Stage, settings: IndexConfig, seed: int, features: FeatureSet, factory: str, index: faiss.Index
) -> dict[str, Any]:
    if not index.is_trained:
        at = sample_positions(features.num_rows, settings.train_rows, seed)
        index.train(_vectors(features.take(features.row_ids(at)), settings.metric))
    with Progress("index", total=features.num_rows, unit="rows") as progress:
        for first, rows in SetReference(features).blocks():
            index.add_with_ids(_vectors(rows, settings.metric), np.arange(first, first + len(rows), dtype=np.int64))
            progress.advance(len(rows))
    at = sample_positions(features.num_rows, settings.recall_queries, seed)
    recall, nprobe = _tune(index, features, features.row_ids(at), settings)
    with replacing(stage.path / "index.faiss") as temporary:
        faiss.write_index(index, str(temporary))
    write_json(stage.path / "parts.json", [asdict(part) for part in features.parts])
    return {
        "factory": factory,
        "metric": settings.metric,
        "datasets": list(features.stores),
        "num_vectors": features.num_rows,
        "dim": features.dim,
        "bytes": (stage.path / "index.faiss").stat().st_size,
        "bytes_planned": estimate_bytes(factory, features.num_rows, features.dim)
        if settings.factory == "auto"
        else None,
        "nprobe": nprobe,
        "recall_queries": len(at),
        "recall_at_10": recall,
    }


def _empty_index(factory: str, dim: int, metric: str) -> faiss.Index:
    measure = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    try:
        index = faiss.index_factory(dim, factory, measure)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            "faiss does not understand this factory string",
            got=f"{factory!r} for {dim} dimensions: {reason}",
            allowed="auto, or a string such as Flat, IVF1024,Flat or OPQ16_64,IVF1024,PQ16",
            fix="set index.factory",
        ) from None
    # inverted lists keep ids themselves; a refining index above them does not
    keeps_ids = faiss.try_extract_index_ivf(index) is not None and not isinstance(index, faiss.IndexRefine)
    return index if keeps_ids else faiss.IndexIDMap2(index)


def _check_training_rows(index: faiss.Index, factory: str, rows: int) -> None:
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None and lists.nlist > rows:
        raise UserError(
            "the index has more lists than vectors to train them on",
            got=f"{factory!r} with {rows} vectors",
            allowed=f"at most {rows} lists",
            fix="set index.factory to auto, or raise index.train_rows",
        )


def _vectors(rows: np.ndarray, metric: str) -> np.ndarray:
    return np.ascontiguousarray(prepare(rows, metric), dtype=np.float32)


def _tune(
    index: faiss.Index, features: FeatureSet, query_ids: np.ndarray, settings: IndexConfig
) -> tuple[float | None, int | None]:
    """(recall@10, nprobe). Where nprobe is left open it doubles until the sample's recall is WANTED_RECALL.

    Recall is the share of the exact 10 nearest (or all N - 1, if fewer) that the index returns, the query itself left
    out by its id on both sides; None with a single vector.
    """
    lists = faiss.try_extract_index_ivf(index)
    k = min(10, features.num_rows - 1)
    queries = features.take(query_ids)
    truth = exact_knn(queries, query_ids, SetReference(features), k, settings.metric)[1] if k else None
    vectors = _vectors(queries, settings.metric)

    def recall() -> float | None:
        if truth is None:
            return None
        found = index.search(vectors, k + 1)[1]
        return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(truth, found, strict=True)]) / k)

    if lists is None:
        return recall(), None
    lists.nprobe = min(settings.nprobe or 1, lists.nlist)
    measured = recall()
    while settings.nprobe is None and measured is not None and measured < WANTED_RECALL and lists.nprobe < lists.nlist:
        lists.nprobe = min(2 * lists.nprobe, lists.nlist)
        measured = recall()
    return measured, int(lists.nprobe)
