"""`sslscale anomaly`: kNN anomaly scores of the parts of a feature store.

anomaly/<name>/scores/<dataset>/part-00042.npy      fp32 (n,), aligned to the feature part's rows; high: anomalous
anomaly/<name>/neighbours/<dataset>/part-00042.npy  int64 (n, k), row ids within the reference set, nearest first
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sslscale.anomaly.knn import KNNWorker, check_k
from sslscale.anomaly.measures import anomaly_measures
from sslscale.config import AnomalyConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.rundir import RunDir, Stage
from sslscale.runtime.base import Resources, Runtime
from sslscale.runtime.progress import Progress


def run_anomaly(
    run: RunDir, config: RunConfig, runtime: Runtime, *, name: str = "main", overwrite: bool = False
) -> dict[str, Any]:
    """Scores `config.anomaly.datasets` against its reference; continues with the parts that an earlier call left.

    Returns result.json. `reference` lists the datasets that neighbours' row ids count over, in order; measures are
    over all scored rows, and with several datasets `datasets` has each one's own.
    """
    settings = config.anomaly
    if settings is None:
        raise UserError("the config has no section 'anomaly'", fix="add one, or leave this stage out")
    features = open_features(run, settings.datasets)
    reference = features if settings.reference is None else open_features(run, settings.reference)
    reference.check_comparable(features)
    check_k(settings.k, reference.num_rows)
    stage = run.open_stage(
        "anomaly",
        name,
        {**settings.identity(), "threads": config.runtime.threads},
        {"features": features.identity, "reference": reference.identity},
        overwrite=overwrite,
    )
    if not stage.done:
        _score_parts(stage, config, settings, runtime, features, reference)
        stage.finish(_result(stage, settings, features, reference))
    return stage.result


def _score_parts(
    stage: Stage,
    config: RunConfig,
    settings: AnomalyConfig,
    runtime: Runtime,
    features: FeatureSet,
    reference: FeatureSet,
) -> None:
    setup = {
        "features": features.paths,
        "reference": reference.paths,
        "k": settings.k,
        "metric": settings.metric,
        "output": str(stage.path),
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


def _result(stage: Stage, settings: AnomalyConfig, features: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    scores = np.concatenate([np.load(stage.path / "scores" / part.file) for part in features.parts])
    result: dict[str, Any] = {
        "num_samples": features.num_rows,
        "num_reference": reference.num_rows,
        "reference": list(reference.stores),
        "k": settings.k,
        "metric": settings.metric,
        "mean_score": float(scores.mean()),
        "measures": anomaly_measures(scores, features.labels(), settings.normal_labels),
    }
    if len(features.stores) > 1:
        result["datasets"] = {
            name: {
                "num_samples": here.stop - here.start,
                "measures": anomaly_measures(scores[here], features.labels(name), settings.normal_labels),
            }
            for name, here in features.slices.items()
        }
    return result
