"""recall@10 of an index against exact search, and the search effort that the wanted recall takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from sslscale.config import IndexConfig
from sslscale.features import FeatureSet, sample_positions
from sslscale.index.exact import RowReference, exact_knn, row_distances
from sslscale.index.factory import Effort, inverted_lists, starting_effort
from sslscale.index.record import IndexRecord
from sslscale.index.search_worker import Request, SearchWorker, Shard, nearest_of
from sslscale.index.shard import prepared
from sslscale.index.tune import tune

TIE = 1e-5  # of a distance: what fp32 makes of equal ones


def tuned(record: IndexRecord, features: FeatureSet, settings: IndexConfig, seed: int) -> dict[str, Any]:
    """The effort, the recall and the number of vectors, as result.json has them.

    Recall is the share of the 10 nearest (or all N - 1, if fewer) that the index returns, the query itself left out by
    its id on both sides; a row as near as the exact search's last one counts as one of them, whichever of several equal
    rows that took. None with a single vector.
    """
    start = time.perf_counter()
    worker = SearchWorker(record=record, features=features.paths)
    shards = [worker.shard(number) for number in range(len(record.shards))]
    num_vectors = sum(shard.num_kept() for shard in shards)
    k = min(10, num_vectors - 1)
    first = _least(shards[0], settings)
    found: dict[str, Any] = {**asdict(first), "recall_queries": 0, "recall_at_10": None}
    if k > 0:
        positions = sample_positions(num_vectors, settings.recall_queries, seed)
        own = _row_ids(shards, positions)
        queries = features.take(own)
        reference = RowReference(features, lambda: (ids for shard in shards for ids in shard.row_ids()))
        distances, truth = exact_knn(queries, own, reference, k, settings.metric)
        x = prepared(queries, settings.metric)

        def recall(effort: Effort) -> float:
            request = Request(x, k + 1, effort)
            ids = nearest_of([shard.search(request) for shard in shards], k + 1).ids
            others = (ids != own[:, None]) & (ids >= 0)
            others &= np.cumsum(others, axis=1) <= k
            hits = others & (ids[:, :, None] == truth[:, None, :]).any(axis=2)
            query, at = np.nonzero(others & ~hits)
            away = row_distances(x[query], prepared(features.take(ids[query, at]), settings.metric), settings.metric)
            hits[query, at] = away <= distances[query, -1] * (1 + TIE)
            return float(hits.sum() / truth.size)

        lists = inverted_lists(shards[0].index)
        scanned = 0.0 if lists is None else num_vectors / lists.nlist * lists.code_size
        limits = replace(first, nprobe=_most(first.nprobe, settings, lists), ef_search=first.ef_search and 4096)
        best = tune(recall, first, limits, settings.wanted_recall, scanned)
        found = {**asdict(best.effort), "recall_queries": len(own), "recall_at_10": best.recall}
    return {"num_vectors": num_vectors, **found, "measure_seconds": time.perf_counter() - start}


def _least(shard: Shard, settings: IndexConfig) -> Effort:
    effort = starting_effort(shard.index)
    lists = inverted_lists(shard.index)
    if lists is None or settings.nprobe is None:
        return effort
    return replace(effort, nprobe=min(settings.nprobe, lists.nlist))


def _most(least: int | None, settings: IndexConfig, lists: Any) -> int | None:
    return least if lists is None or settings.nprobe is not None else lists.nlist


def _row_ids(shards: list[Shard], positions: np.ndarray) -> np.ndarray:
    """The row ids at ascending positions among all that the shards keep, one shard after the other."""

    def wanted() -> Iterator[np.ndarray]:
        start = 0
        for shard in shards:
            for ids in shard.row_ids():
                here = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + len(ids))]
                yield ids[here - start]
                start += len(ids)

    return np.concatenate(list(wanted()))
