"""The embed stage: the parts of a dataset, pulled by a pool of workers, each written and committed on its own."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.config import EmbedConfig, RunConfig
from sslscale.embed.corpus import Corpus
from sslscale.embed.worker import EmbedWorker
from sslscale.errors import UserError
from sslscale.features.files import write_npy
from sslscale.features.store import FORMAT_VERSION, FeatureStore, part_name
from sslscale.models.load import EmbedderSpec, find_embedder
from sslscale.models.outputs import fit_pca
from sslscale.objectives.export import read_objective_meta
from sslscale.pretrain.stage import dataset_shards
from sslscale.rundir import RunDir, Stage, discard
from sslscale.runtime.base import Resources, Runtime
from sslscale.runtime.progress import Progress
from sslscale.shards.dataset import ShardSet
from sslscale.shards.plan import Span, plan_parts

PCA_SPANS = 32  # that the sample of a projection is taken from, evenly spaced over the dataset


def run_embed(
    run: RunDir, config: RunConfig, runtime: Runtime, *, overwrite: bool = False, backbone: str | None = None
) -> dict[str, dict[str, Any]]:
    """Embeds every dataset of embed.datasets into RUN/embed/<dataset>. Returns each dataset's result.json.

    `backbone` embeds with another than the config's: the baselines of a run.
    """
    spec = find_backbone(run, config, backbone)
    spec.build()  # raises before anything is written
    if config.embed.pca is not None:
        spec = _with_pca(run, config, runtime, spec, overwrite)
    return {name: embed_dataset(run, config, runtime, name, spec, overwrite) for name in config.embed.datasets}


def find_backbone(run: RunDir, config: RunConfig, backbone: str | None = None) -> EmbedderSpec:
    """What embed.backbone names, or `backbone` in its place; UserError where there is no such thing."""
    trained, settings = config.pretrain, config.embed
    return find_embedder(
        backbone or settings.backbone,
        run.path,
        channels=settings.channels or (trained.backbone.channels if trained else None),
        size=settings.size,
        run_size=trained.backbone.input_size(trained.views) if trained else None,
        output=settings.output,
    )


def _with_pca(run: RunDir, config: RunConfig, runtime: Runtime, spec: EmbedderSpec, overwrite: bool) -> EmbedderSpec:
    """`spec` followed by a PCA, in RUN/projection: one for all datasets, fitted on a sample of the first."""
    dim, width, dataset = config.embed.pca, spec.build().feature_dim, config.embed.datasets[0]
    assert dim is not None
    check_pca(dim, width)
    shards = dataset_shards(run, config, dataset)
    settings = {
        name: value
        for name, value in config.embed.identity().items()
        if name in ("pca", "pca_rows", "batch_size", "autocast", "compile")
    }
    settings |= {"dataset": dataset, "size": spec.size, "threads": config.runtime.threads}
    corpus = Corpus.of(shards, run.stage_path("projection"))
    spans = _sample_spans(shards, config.embed.pca_rows)
    _check_enough(sum(len(span) for part in spans for span in part), dim)
    parents = {"shards": corpus.origin, "backbone": spec.sha256}
    stage = run.open_stage("projection", None, settings, parents, overwrite=overwrite)
    if not stage.done:
        corpus.save(stage.path)
        raw = config.embed.model_copy(update={"dtype": "fp32", "normalize": False})  # what the projection is given
        with _pool(stage, config.model_copy(update={"embed": raw}), runtime, shards, spec, len(spans)) as pool:
            samples = [features for _, features in sorted(pool.map("sample", spans), key=lambda found: found[0])]
        rows = np.concatenate(samples)
        try:
            _check_enough(len(rows), dim)
        except UserError:
            discard(stage.path)  # so that it does not refuse the setting that mends this
            raise
        write_npy(stage.path / "projection.npy", fit_pca(rows, dim))
        stage.finish({"kind": "pca", "dim": dim, "of": width, "rows": len(rows)})
    return spec.projected(stage.path / "projection.npy")


def check_pca(dim: int, width: int) -> None:
    """UserError where embed.pca would keep all `width` dimensions of the backbone's features, or more."""
    if dim >= width:
        raise UserError("embed.pca keeps fewer dimensions than the backbone has", got=dim, allowed=f"1 to {width - 1}")


def _check_enough(samples: int, dim: int) -> None:
    if samples <= dim:
        raise UserError(
            "there are too few samples to fit embed.pca",
            got=samples,
            allowed=f"more than {dim}",
            fix="lower embed.pca, or raise embed.pca_rows where there are more samples",
        )


def _sample_spans(shards: ShardSet, rows: int) -> list[list[Span]]:
    """The spans of PCA_SPANS stretches of the dataset, evenly spaced, of `rows` samples together."""
    total = shards.num_samples
    stretches = min(PCA_SPANS, max(1, total))
    line = plan_parts(shards.counts, max(1, total // stretches))
    length = -(-rows // stretches)
    return [part for spans in line if (part := _first(spans, length))]


def _first(spans: list[Span], length: int) -> list[Span]:
    kept: list[Span] = []
    for span in spans:
        if length > 0:
            kept.append(Span(span.shard, span.start, min(span.stop, span.start + length)))
            length -= len(span)
    return kept


def embed_dataset(
    run: RunDir, config: RunConfig, runtime: Runtime, dataset: str, spec: EmbedderSpec, overwrite: bool = False
) -> dict[str, Any]:
    """Embeds one dataset of the config by `spec` into RUN/embed/<dataset>. Returns its result.json."""
    shards = dataset_shards(run, config, dataset)
    corpus = Corpus.of(shards, run.stage_path("embed", dataset))
    settings = {**config.embed.identity(), "size": spec.size, "threads": config.runtime.threads}
    settings["store_format"] = FORMAT_VERSION  # so that --overwrite replaces features of an older one
    for name in ("datasets", "backbone", "channels"):  # each dataset is a stage of its own; the parent is the backbone
        del settings[name]
    objective = _objective(spec)
    parents = {"shards": corpus.origin, "backbone": spec.sha256, **objective}
    try:
        stage = run.open_stage("embed", dataset, settings, parents, overwrite=overwrite)
    except UserError as error:
        if not corpus.changed:
            raise
        names = f"{', '.join(corpus.changed[:3])}{' ...' if len(corpus.changed) > 3 else ''}"
        raise UserError(error.what, got=f"{error.got} (changed or gone: {names})", fix=error.fix) from None
    parts = corpus.parts(shards, config.embed.part_rows)
    records, whole = _kept(stage, len(parts))
    if stage.done:
        if whole and stage.result["corpus"] == corpus.fingerprint:
            return stage.result
        run.on_start(stage.path)
    corpus.save(stage.path)
    todo = [(part, parts[part]) for part, record in records.items() if record is None]
    begin = time.perf_counter()
    with (
        Progress(f"embed {dataset}", total=shards.num_samples, unit="samples") as progress,
        _pool(stage, config, runtime, shards, spec, len(todo), further=bool(objective)) as pool,
    ):
        progress.start_at(sum(record["samples_in"] for record in records.values() if record))
        for index, record in pool.map("embed", todo):
            failures = record.pop("failures")
            record["failed"] = len(failures)
            part = todo[index][0]
            stage.finish_part(part_name(part), record, failures)
            records[part] = record
            progress.advance(record["samples_in"])
    done = sum(len(span) for _, spans in todo for span in spans)
    result = _finish(stage, config, spec, records)
    return stage.finish(
        {
            "dataset": dataset,
            **result,
            "excluded": shards.num_excluded,
            "corpus": corpus.fingerprint,
            "generations": len(corpus.generations),
            "samples_per_second": done / (time.perf_counter() - begin),
        }
    )


def _kept(stage: Stage, parts: int) -> tuple[dict[int, dict[str, Any] | None], bool]:
    """The record of each part, None where a file of it is missing or cut; and whether nothing at all is missing."""
    found = storage.sizes(stage.path)
    records = {part: stage.part_done(part_name(part)) for part in range(parts)}
    kept = {part: record if record and _is_there(record, found) else None for part, record in records.items()}
    return kept, {"ids.npy", "features.json"} <= found.keys() and None not in kept.values()


def _is_there(record: dict[str, Any], found: dict[str, int]) -> bool:
    """Whether both files of a part have the sizes in its record, which former versions did not write."""
    name = part_name(record["part"])
    sizes = {"bytes": found.get(f"{name}.npy"), "table_bytes": found.get(f"{name}.parquet")}
    return all(size is not None and record.get(field, size) == size for field, size in sizes.items())


def _objective(spec: EmbedderSpec) -> dict[str, str]:
    """The hash of the objective that was exported beside the backbone, where it gives more than features."""
    folder = Path(spec.location)
    exported = storage.bring(folder / "backbone.json").is_file()
    meta = read_objective_meta(folder.with_name("objective")) if exported else None
    return {"objective": meta["sha256"]} if meta is not None and meta["further_outputs"] else {}


def _pool(
    stage: Stage,
    config: RunConfig,
    runtime: Runtime,
    shards: ShardSet,
    spec: EmbedderSpec,
    items: int,
    *,
    further: bool = False,
) -> Any:
    device = runtime.device(config.embed.device)
    setup = {
        "store": str(stage.path),
        "shards": shards,
        "spec": spec,
        "objective": str(Path(spec.location).with_name("objective")) if further else None,
        "batch_size": config.embed.batch_size,
        "dtype": config.embed.dtype,
        "normalize": config.embed.normalize,
        "decode_threads": config.embed.decode_threads,
        "device": device,
        "autocast": config.embed.autocast,
        "compile": config.embed.compile,
    }
    resources = Resources(threads=config.runtime.threads, gpus=1.0 if device == "cuda" else 0.0)
    return runtime.pool(EmbedWorker, setup, min(config.runtime.workers, max(1, items)), resources)


def _finish(stage: Stage, config: RunConfig, spec: EmbedderSpec, records: dict[int, Any]) -> dict[str, Any]:
    """Checks that the counts add up and commits the store; returns what the result says of it."""
    settings: EmbedConfig = config.embed
    samples_in = sum(record["samples_in"] for record in records.values())
    features_out = sum(record["rows"] for record in records.values())
    failed = sum(record["failed"] for record in records.values())
    assert samples_in == features_out + failed, f"{stage.path}: {samples_in} in, {features_out} out, {failed} failed"
    stage.check_failed_share(failed, samples_in, settings.max_failed_share)
    dim = spec.build().feature_dim
    store = FeatureStore.create(
        stage.path, dim=dim, dtype=settings.dtype, normalized=settings.normalize, backbone=spec.sha256
    )
    fields = ("part", "rows", "sha256", "table_sha256")
    store.commit([{name: record[name] for name in fields} for record in records.values()])
    return {
        "samples_in": samples_in,
        "features_out": features_out,
        "failed": failed,
        "bad_labels": sum(record.get("bad_labels", 0) for record in records.values()),  # not in older records
        "dim": dim,
        "parts": len(records),
        "dtype": settings.dtype,
        "backbone": {**asdict(spec), "sha256": spec.sha256},
    }
