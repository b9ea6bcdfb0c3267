"""The pretrain stage: checks what can be checked before anything starts, launches the ranks, records the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslscale.config import PretrainConfig, RunConfig
from sslscale.errors import UserError, did_you_mean
from sslscale.objectives import objective_settings
from sslscale.pretrain.launch import launch
from sslscale.rundir import Metrics, RunDir
from sslscale.runtime.base import Runtime
from sslscale.runtime.progress import Progress
from sslscale.shards.dataset import ShardSet, open_shards


def dataset_shards(run: RunDir, config: RunConfig, dataset: str) -> ShardSet:
    """The shards of a dataset that the config names."""
    if dataset not in config.datasets:
        raise UserError(
            f"the config names no dataset {dataset!r}{did_you_mean(dataset, config.datasets)}",
            allowed=", ".join(config.datasets) or "none yet",
            fix=f"add datasets.{dataset}=SHARDS",
        )
    return open_shards(config.datasets[dataset], cache=run.path / "cache" / dataset, limit=config.limit)


def run_pretrain(run: RunDir, config: RunConfig, runtime: Runtime, *, overwrite: bool = False) -> dict[str, Any]:
    """Trains, or goes on training, RUN/pretrain. Returns its result.json."""
    if config.pretrain is None:
        raise UserError("the config has no pretrain section", fix="add one, or give embed.backbone a backbone/ folder")
    shards = dataset_shards(run, config, config.pretrain.dataset)
    if shards.num_samples < config.pretrain.num_streams:
        raise UserError(
            "there are fewer samples than streams",
            got=f"{shards.num_samples} samples, pretrain.num_streams={config.pretrain.num_streams}",
            fix="lower pretrain.num_streams",
        )
    if config.pretrain.probe is not None:
        dataset_shards(run, config, config.pretrain.probe.dataset)
    cls, objective = objective_settings(config.pretrain.objective)
    _check_views(cls, config)
    settings = {**config.pretrain.identity(), "seed": config.seed}
    settings["objective"] = {"name": config.pretrain.objective["name"], **objective}
    parents = {"shards": shards.fingerprint, **_initial_weights(config.pretrain)}
    stage = run.open_stage("pretrain", None, settings, parents, overwrite=overwrite)
    if stage.done:
        return stage.result
    with Progress("pretrain", unit="steps") as progress:
        result = launch(stage.path, config, runtime, _follow(stage.path, progress))
    return stage.finish(result)


def _initial_weights(config: PretrainConfig) -> dict[str, str]:
    """The hash of the weights that training starts from, where there are any, after trying whether they fit."""
    if config.init_from is None:
        return {}
    from sslscale.models.image import Backbone
    from sslscale.models.initial import hash_weights, load_weights

    sha256 = hash_weights(config.init_from, config.backbone)
    load_weights(Backbone(config.backbone), config.init_from)
    return {"init_from": sha256}


def _check_views(cls: Any, config: RunConfig) -> None:
    """Builds the objective once, on no data, so that what it refuses is refused before any rank starts."""
    import torch

    from sslscale.models.image import Backbone
    from sslscale.objectives import build_objective
    from sslscale.pretrain.engine import accumulation

    assert config.pretrain is not None
    with torch.device("meta"):
        build_objective(config.pretrain.objective, Backbone(config.pretrain.backbone), config.pretrain.views)
    accumulation(config.pretrain, config.pretrain.num_workers, cls.needs_whole_batch)
    if config.pretrain.zero_stage > cls.max_zero_stage:
        raise UserError(
            f"the objective {config.pretrain.objective['name']!r} reads whole parameters after every step",
            got=f"pretrain.zero_stage={config.pretrain.zero_stage}, which leaves each rank a part of them",
            allowed=f"pretrain.zero_stage <= {cls.max_zero_stage}",
        )


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
