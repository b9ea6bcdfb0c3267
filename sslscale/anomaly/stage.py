"""`sslscale anomaly`: kNN anomaly scores of the parts of a feature store, or those that the objective gave them.

anomaly/<name>/scores/<dataset>/part-00042.npy      fp32 (n,), aligned to the feature part's rows; high: anomalous
anomaly/<name>/neighbours/<dataset>/part-00042.npy  int64 (n, k), row ids within the reference set, nearest first;
                                                    none with method=objective, and then `reference` is empty, k null
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslscale.anomaly.knn import KNNWorker, check_k
from sslscale.anomaly.measures import anomaly_measures
from sslscale.config import AnomalyConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.features.files import open_npy, write_npy
from sslscale.index.all_pairs import Neighbours, all_pairs
from sslscale.rundir import RunDir, Stage
from sslscale.runtime.base import Resources, Runtime
from sslscale.runtime.progress import Progress

EXACT_ROWS = 2**17  # above it `auto` searches by lists


def run_anomaly(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Scores `config.anomaly.datasets` against its reference; continues with the parts that an earlier call left.

    Many rows that are their own reference are searched by `all_pairs`, in RUN/neighbours/<name>; `auto` decides by
    their number. The exact search takes a time that grows with its square.
    Returns result.json. `reference` lists the datasets that neighbours' row ids count over, in order; measures are
    over all scored rows, and with several datasets `datasets` has each one's own.
    """
    settings = config.anomaly
    if settings is None:
        raise UserError("the config has no section 'anomaly'", fix="add one, or leave this stage out")
    features = open_features(run, settings.datasets)
    if settings.method == "objective":
        return _take_given(run, settings, features, name, overwrite)
    reference = features if settings.reference is None else open_features(run, settings.reference)
    reference.check_comparable(features)
    check_k(settings.k, reference.num_rows)
    method = _method(settings, features, reference)
    stage = run.open_stage(
        "anomaly",
        name,
        {**settings.identity(), "method": method, "threads": config.runtime.threads},
        {"features": features.identity, "reference": reference.identity},
        overwrite=overwrite,
    )
    if not stage.done:
        found = None
        if method == "all_pairs":
            found = all_pairs(
                run,
                config,
                runtime,
                features,
                k=settings.k,
                metric=settings.metric,
                wanted_recall=settings.wanted_recall,
                name=name,
                overwrite=overwrite,
            )
        _score_parts(stage, config, settings, runtime, features, reference, found)
        recall = found.result["recall"] if found else 1.0
        stage.finish({**_result(stage, settings, features, reference), "method": method, "recall": recall})
    return stage.result


def _take_given(
    run: RunDir, settings: AnomalyConfig, features: FeatureSet, name: str, overwrite: bool
) -> dict[str, Any]:
    """The scores that the objective gave when the features were embedded."""
    features.check_column("score")
    stage = run.open_stage("anomaly", name, settings.identity(), {"features": features.identity}, overwrite=overwrite)
    if not stage.done:
        for part in features.parts:
            scores = features.column(part.number, "score") if part.rows else np.zeros(0)
            write_npy(stage.path / "scores" / part.file, scores.astype(np.float32))
        stage.finish({**_result(stage, settings, features, None), "method": "objective", "recall": None})
    return stage.result


def _method(settings: AnomalyConfig, features: FeatureSet, reference: FeatureSet) -> str:
    if settings.method != "auto":
        return settings.method
    itself = features.identity == reference.identity
    return "all_pairs" if itself and features.num_rows > EXACT_ROWS else "exact"


def _score_parts(
    stage: Stage,
    config: RunConfig,
    settings: AnomalyConfig,
    runtime: Runtime,
    features: FeatureSet,
    reference: FeatureSet,
    found: Neighbours | None,
) -> None:
    setup = {
        "features": features.paths,
        "reference": reference.paths,
        "k": settings.k,
        "metric": settings.metric,
        "output": str(stage.path),
        "neighbours": None if found is None else str(found.path),
    }
    missing = [part.number for part in features.parts if stage.part_done(str(part.number)) is None]
    if not missing:
        return
    workers = min(config.runtime.workers, len(missing))
    with (
        Progress("anomaly", total=features.num_rows, unit="rows") as progress,
        runtime.pool(KNNWorker, setup, workers, Resources(threads=config.runtime.threads)) as pool,
    ):
        progress.start_at(features.num_rows - sum(features.parts[number].rows for number in missing))
        for index, record in pool.map("score", missing):
            stage.finish_part(str(missing[index]), record)
            progress.advance(record["rows"])


def _result(
    stage: Stage, settings: AnomalyConfig, features: FeatureSet, reference: FeatureSet | None
) -> dict[str, Any]:
    # by file, each opened for its turn only: a process may have about a thousand open
    by_dataset = {
        name: [stage.path / "scores" / part.file for part in features.parts if part.dataset == name]
        for name in features.stores
    }
    total = sum(float(open_npy(file).sum(dtype=np.float64)) for files in by_dataset.values() for file in files)
    result: dict[str, Any] = {
        "num_samples": features.num_rows,
        "num_reference": reference.num_rows if reference else 0,
        "reference": list(reference.stores) if reference else [],
        "k": settings.k if reference else None,
        "metric": settings.metric,
        "mean_score": total / features.num_rows,
        "measures": _measures(settings, features, by_dataset),
    }
    if len(features.stores) > 1:
        result["datasets"] = {
            name: {
                "num_samples": features.stores[name].num_rows,
                "measures": _measures(settings, features, {name: files}),
            }
            for name, files in by_dataset.items()
        }
    return result


def _measures(
    settings: AnomalyConfig, features: FeatureSet, by_dataset: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """Of the datasets given, by the files of their scores.

    Only where it is known what is normal are all scores in memory at a time.
    """
    if settings.normal_labels is None:
        return anomaly_measures(np.empty(0), None, None)
    labels = [features.stores[name].labels() for name in by_dataset]
    known = [part for part in labels if part is not None]
    everyone = np.concatenate(known) if len(known) == len(labels) else None
    scores = np.concatenate([np.array(open_npy(file)) for files in by_dataset.values() for file in files])
    return anomaly_measures(scores, everyone, settings.normal_labels)
