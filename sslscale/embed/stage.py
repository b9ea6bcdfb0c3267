"""The embed stage: the parts of a dataset, pulled by a pool of workers, each written and committed on its own."""

from __future__ import annotations

import time
from typing import Any

from sslscale.config import EmbedConfig, RunConfig
from sslscale.embed.worker import EmbedWorker
from sslscale.features.store import FeatureStore
from sslscale.models.load import EmbedderSpec, find_embedder
from sslscale.pretrain.loop import pick_device
from sslscale.pretrain.stage import dataset_shards
from sslscale.rundir import RunDir, Stage
from sslscale.runtime.base import Resources, Runtime
from sslscale.runtime.progress import Progress
from sslscale.shards.plan import plan_parts


def run_embed(
    run: RunDir, config: RunConfig, runtime: Runtime, *, overwrite: bool = False, backbone: str | None = None
) -> dict[str, dict[str, Any]]:
    """Embeds every dataset of embed.datasets into RUN/embed/<dataset>. Returns each dataset's result.json.

    `backbone` embeds with another than the config's: the baselines of a run.
    """
    trained = config.pretrain
    spec = find_embedder(
        backbone or config.embed.backbone,
        run.path,
        channels=trained.backbone.channels if trained else None,
        size=config.embed.size or (trained.views.size if trained else None),
    )
    return {name: _embed_dataset(run, config, runtime, name, spec, overwrite) for name in config.embed.datasets}


def _embed_dataset(
    run: RunDir, config: RunConfig, runtime: Runtime, dataset: str, spec: EmbedderSpec, overwrite: bool
) -> dict[str, Any]:
    shards = dataset_shards(run, config, dataset)
    settings = {**config.embed.identity(), "size": spec.size, "threads": config.runtime.threads}
    del settings["datasets"], settings["backbone"]  # each dataset is a stage of its own; the parent names the backbone
    parents = {"shards": shards.fingerprint, "backbone": spec.sha256}
    stage = run.open_stage("embed", dataset, settings, parents, overwrite=overwrite)
    if stage.done:
        return stage.result
    parts = plan_parts(shards.counts, config.embed.part_rows)
    records = {part: stage.part_done(f"part-{part:05d}") for part in range(len(parts))}
    todo = [(part, parts[part]) for part, record in records.items() if record is None]
    begin = time.perf_counter()
    with (
        Progress(f"embed {dataset}", total=shards.num_samples, unit="samples") as progress,
        runtime.pool(
            EmbedWorker,
            _worker_setup(stage, run, config, dataset, spec),
            min(config.runtime.workers, max(1, len(todo))),
            Resources(threads=config.runtime.threads, gpus=1.0 if _device(config.embed) == "cuda" else 0.0),
        ) as pool,
    ):
        progress.start_at(sum(record["samples_in"] for record in records.values() if record))
        for index, record in pool.map("embed", todo):
            failures = record.pop("failures")
            record["failed"] = len(failures)
            part = todo[index][0]
            stage.finish_part(f"part-{part:05d}", record, failures)
            records[part] = record
            progress.advance(record["samples_in"])
    done = sum(len(span) for _, spans in todo for span in spans)
    return _finish(stage, config, dataset, spec, records, done / (time.perf_counter() - begin))


def _device(config: EmbedConfig) -> str:
    return pick_device(config.device).type


def _worker_setup(stage: Stage, run: RunDir, config: RunConfig, dataset: str, spec: EmbedderSpec) -> dict[str, Any]:
    return {
        "store": str(stage.path),
        "shards": config.datasets[dataset],
        "cache": str(run.path / "cache" / dataset),
        "spec": spec,
        "batch_size": config.embed.batch_size,
        "dtype": config.embed.dtype,
        "normalize": config.embed.normalize,
        "decode_threads": config.embed.decode_threads,
        "device": _device(config.embed),
    }


def _finish(
    stage: Stage, config: RunConfig, dataset: str, spec: EmbedderSpec, records: dict[int, Any], rate: float
) -> dict[str, Any]:
    """Checks that the counts add up, commits the store and writes the result."""
    samples_in = sum(record["samples_in"] for record in records.values())
    features_out = sum(record["rows"] for record in records.values())
    failed = sum(record["failed"] for record in records.values())
    assert samples_in == features_out + failed, f"{dataset}: {samples_in} in, {features_out} out, {failed} failed"
    stage.check_failed_share(failed, samples_in, config.embed.max_failed_share)
    dim = spec.build().feature_dim
    store = FeatureStore.create(
        stage.path, dim=dim, dtype=config.embed.dtype, normalized=config.embed.normalize, backbone=spec.sha256
    )
    fields = ("part", "rows", "sha256", "table_sha256")
    store.commit([{name: record[name] for name in fields} for record in records.values()])
    return stage.finish(
        {
            "dataset": dataset,
            "samples_in": samples_in,
            "features_out": features_out,
            "failed": failed,
            "dim": dim,
            "parts": len(records),
            "dtype": config.embed.dtype,
            "backbone": {"name": spec.name, "location": spec.location, "sha256": spec.sha256},
            "samples_per_second": rate,
        }
    )
