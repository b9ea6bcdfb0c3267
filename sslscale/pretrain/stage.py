"""The pretrain stage: checks what can be checked before anything starts, launches the ranks, records the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslscale import storage
from sslscale.config import PretrainConfig, RunConfig
from sslscale.config.load import check_dataset
from sslscale.errors import UserError
from sslscale.objectives import objective_settings
from sslscale.pretrain.launch import launch
from sslscale.rundir import Metrics, RunDir
from sslscale.runtime.base import Runtime
from sslscale.runtime.progress import Progress
from sslscale.shards.cache import ShardCache
from sslscale.shards.dataset import ShardSet, open_shards
from sslscale.shards.stream import Sample, read_spans, spread_spans

if TYPE_CHECKING:
    from sslscale.objectives.base import Objective
    from sslscale.pretrain.corpus import CorpusTools


def dataset_shards(run: RunDir, config: RunConfig, dataset: str) -> ShardSet:
    """The shards of a dataset that the config names."""
    check_dataset(config, dataset)
    return open_shards(config.datasets[dataset], cache=ShardCache.of(config), limit=config.limit)


def run_pretrain(
    run: RunDir, config: RunConfig, runtime: Runtime, tools: CorpusTools, *, overwrite: bool = False
) -> dict[str, Any]:
    """Trains, or goes on training, RUN/pretrain; `tools` as for `launch`. Returns its result.json."""
    if config.pretrain is None:
        raise UserError("the config has no pretrain section", fix="add one, or give embed.backbone a backbone/ folder")
    check_settings(config)
    shards = dataset_shards(run, config, config.pretrain.dataset)
    if shards.num_samples < config.pretrain.num_streams:
        raise UserError(
            "there are fewer samples than streams",
            got=f"{shards.num_samples} samples, pretrain.num_streams={config.pretrain.num_streams}",
            fix="lower pretrain.num_streams",
        )
    if config.pretrain.probe is not None:
        dataset_shards(run, config, config.pretrain.probe.dataset)
    if config.pretrain.held_out is not None:
        dataset_shards(run, config, config.pretrain.held_out)
    _, objective = objective_settings(config.pretrain.objective)
    settings = {**config.pretrain.identity(), "seed": config.seed}
    settings["objective"] = {"name": config.pretrain.objective["name"], **objective}
    parents = {"shards": shards.fingerprint, **_initial_weights(config.pretrain)}
    stage = run.open_stage("pretrain", None, settings, parents, overwrite=overwrite)
    if stage.done:
        return stage.result
    fit_backbone(stage.path, config.pretrain, shards)
    with Progress("pretrain", unit="steps") as progress:
        result = launch(stage.path, config, runtime, tools, _follow(stage.path, progress))
    return stage.finish(result)


def _initial_weights(config: PretrainConfig) -> dict[str, str]:
    """The hashes of the weights that training starts from, where there are any, after trying whether they fit."""
    if config.init_from is None:
        return {}
    from sslscale.models.export import build_backbone
    from sslscale.models.initial import hash_weights, load_weights
    from sslscale.objectives import build_objective
    from sslscale.objectives.export import load_heads

    found = {"init_from": hash_weights(config.init_from, config.backbone)}
    backbone = build_backbone(config.backbone)
    load_weights(backbone, config.init_from)
    heads = load_heads(build_objective(config.objective, backbone, config.views), config.init_from)
    return found if heads is None else {**found, "heads": heads}


def fit_backbone(folder: Path, config: PretrainConfig, shards: ShardSet) -> None:
    """Makes what the backbone needs of the corpus before it can be built, a tokenizer, in the folder of the stage.

    With `init_from` it is what those weights were trained with.
    """
    from sslscale.models.export import backbone_class
    from sslscale.models.initial import initial_files
    from sslscale.pretrain.loop import FITTED

    cls, target = backbone_class(config.backbone.library), folder / FITTED
    if all(storage.bring(target / name).is_file() for name in cls.FILES):
        return
    target.mkdir(parents=True, exist_ok=True)
    if config.init_from is not None:
        for name in cls.FILES:
            shutil.copyfile(storage.bring(initial_files(config.init_from) / name), target / name)
    else:
        cls.fit(config.backbone, lambda limit: _samples(shards, limit), target)
    storage.publish_tree(target)


def _samples(shards: ShardSet, limit: int) -> Iterator[dict[str, Any]]:
    read = read_spans(shards, spread_spans(shards, limit))
    return (item.data for item in read if isinstance(item, Sample))


def check_settings(config: RunConfig) -> Objective:
    """UserError for what cannot be trained, whatever the data; returns the objective, built without memory.

    So what it refuses is refused before any rank starts.
    """
    import torch

    from sslscale.models.export import build_backbone
    from sslscale.objectives import build_objective
    from sslscale.pretrain.engine import accumulation, whole_batch

    assert config.pretrain is not None
    probed = [] if config.pretrain.probe is None else [config.pretrain.probe.dataset]
    held_out = [] if config.pretrain.held_out is None else [config.pretrain.held_out]
    for dataset in (config.pretrain.dataset, *probed, *held_out):
        check_dataset(config, dataset)
    with torch.device("meta"):
        backbone = build_backbone(config.pretrain.backbone)
        if config.pretrain.freeze_backbone:
            backbone.freeze()
        if config.pretrain.activation_checkpointing:
            backbone.checkpoint_activations()
        objective = build_objective(config.pretrain.objective, backbone, config.pretrain.views)
    for world_size in config.pretrain.world_sizes:
        accumulation(config.pretrain, world_size, whole_batch(objective, config.pretrain))
    if config.pretrain.zero_stage > objective.max_zero_stage:
        raise UserError(
            f"the objective {config.pretrain.objective['name']!r} reads whole parameters after every step",
            got=f"pretrain.zero_stage={config.pretrain.zero_stage}, which leaves each rank a part of them",
            allowed=f"pretrain.zero_stage <= {objective.max_zero_stage}",
        )
    return objective


def _follow(folder: Path, progress: Progress) -> Any:
    """Shows what rank 0 has logged since the last call."""
    metrics = Metrics(folder / "metrics.jsonl")
    first: list[int] = []

    def tick() -> None:
        lines = [line for line in metrics.read_new() if "loss" in line]
        if not lines:
            return
        last = lines[-1]
        if not first:
            first.append(last["step"])
            progress.start_at(last["step"])
        progress.total = last["total_steps"]
        shown = {name: last[name] for name in ("loss", "data_wait_share") if last.get(name) is not None}
        progress.advance(last["step"] - progress.done, **shown)

    return tick
