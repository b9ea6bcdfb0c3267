"""`sslscale plan`: what a run will read, write, hold and take, before anything of it starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.plan.model import RANKS, Machine, Measured, Memory, Scale, memory, optimizer_bytes, scale
from sslscale.plan.probe import Probe, probe
from sslscale.plan.text import duration, size, table
from sslscale.pretrain.stage import dataset_shards
from sslscale.rundir import RunDir
from sslscale.shards.dataset import ShardSet
from sslscale.shards.plan import plan_stream


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds. Per rank: the largest of all ranks."""

    ranks: int
    steps: int
    samples_per_rank: int
    shards_per_rank: int
    bytes_read: float
    bytes_written: float
    step_seconds: float
    seconds: float
    device_hours: float
    memory_by_zero_stage: dict[int, Memory]
    zero_stage: int
    device: str
    device_bytes: int
    misfits: list[str]
    measured: Measured
    scales: list[Scale]


def run_plan(
    config: RunConfig,
    machine: Machine,
    *,
    ranks: int | None = None,
    probe_steps: int = 12,
    probe_ranks: int | None = None,
) -> Plan:
    """Plans the pretraining of `config` after a short one; `ranks` instead of the config's own.

    The short training has `probe_ranks` ranks, or as many as this machine has devices for (see `probe`).
    UserError where the shards are not there, or where the ranks do not divide streams and batch.
    """
    settings = config.pretrain
    if settings is None:
        raise UserError("the config has no pretrain section", fix="plan measures a training: add one")
    shards = dataset_shards(RunDir(config.run), config, settings.dataset)
    ranks = ranks or settings.world_sizes[-1]
    if settings.num_streams % ranks:
        raise UserError(
            "the ranks must divide pretrain.num_streams",
            got=f"{ranks} ranks, {settings.num_streams} streams",
            fix=f"set pretrain.num_streams to a multiple of {ranks} that divides pretrain.global_batch",
        )
    found = probe(config, ranks, probe_steps, probe_ranks)
    measured = found.measured
    own = scale(measured, machine, settings.zero_stage, ranks)
    steps = settings.steps or max(1, math.ceil((settings.epochs or 0) * shards.num_samples / settings.global_batch))
    saves = steps // settings.checkpoint_every + 1
    seconds = measured.warming_seconds + steps * own.step_seconds
    by_stage = {stage: memory(measured, stage, ranks) for stage in range(4)}
    return Plan(
        ranks=ranks,
        steps=steps,
        samples_per_rank=math.ceil(steps * settings.global_batch / ranks),
        shards_per_rank=_shards_of_a_rank(shards, config.seed, settings.num_streams, ranks),
        bytes_read=steps * settings.global_batch * measured.sample_bytes,
        bytes_written=float(saves * measured.checkpoint_bytes),
        step_seconds=own.step_seconds,
        seconds=seconds,
        device_hours=ranks * seconds / 3600,
        memory_by_zero_stage=by_stage,
        zero_stage=settings.zero_stage,
        device=found.device,
        device_bytes=found.device_bytes,
        misfits=_misfits(found, by_stage, min(ranks, machine.ranks_per_node)),
        measured=measured,
        scales=[scale(measured, machine, settings.zero_stage, number) for number in RANKS],
    )


def _shards_of_a_rank(shards: ShardSet, seed: int, num_streams: int, ranks: int) -> int:
    """The most shards that a rank opens in the first epoch."""
    plans = [
        {span.shard for span in plan_stream(shards.counts, seed, 0, stream, num_streams)}
        for stream in range(num_streams)
    ]
    return max(len(set().union(*plans[rank::ranks])) for rank in range(ranks))


def _misfits(found: Probe, by_stage: dict[int, Memory], ranks_of_a_node: int) -> list[str]:
    """ZeRO stages whose rank is larger than its device; ranks on CPUs share one memory."""
    sharing = 1 if found.device.lower().startswith(("nvidia", "amd instinct")) else ranks_of_a_node
    room = found.device_bytes / sharing
    return [
        f"ZeRO {stage}: a rank needs {size(needed.total)}, and has {size(room)}"
        for stage, needed in by_stage.items()
        if needed.total > room
    ]


def _beside(plan: Plan) -> list[str]:
    """What a rank needs of the node's memory beside its device's."""
    if not plan.measured.offloaded:
        return []
    optimizer = optimizer_bytes(plan.measured, plan.zero_stage, plan.ranks)
    return [f"the optimizer's {size(optimizer)} a rank are in the node's memory"]


def plan_lines(plan: Plan) -> list[str]:
    """The plan as a user reads it."""
    measured = plan.measured
    return [
        f"ranks      {plan.ranks}, ZeRO {plan.zero_stage}, {measured.samples:,} samples a step each",
        f"steps      {plan.steps:,}; a rank reads {plan.samples_per_rank:,} samples, of {plan.shards_per_rank:,} shards"
        " in an epoch",
        f"reads      {size(plan.bytes_read)} of shards",
        f"writes     {size(plan.bytes_written)} of checkpoints ({size(measured.checkpoint_bytes)} each)",
        f"time       {duration(plan.seconds)} ({plan.step_seconds:.3g} s a step), {plan.device_hours:,.2f} device hours"
        f" of {plan.device}; {measured.start_seconds:.0f} s to the first step",
        "",
        f"memory of a rank ({plan.device} has {size(plan.device_bytes)})",
        *table(
            ["", "parameters", "gradients", "optimizer", "activations", "total"],
            [
                [f"ZeRO {stage}{' <' if stage == plan.zero_stage else ''}"]
                + [size(value) for value in (*asdict(needed).values(), needed.total)]
                for stage, needed in plan.memory_by_zero_stage.items()
            ],
        ),
        *_beside(plan),
        *[f"does not fit: {misfit}" for misfit in plan.misfits],
        "",
        f"at {measured.samples:,} samples a rank: {measured.ranks} measured here, more by stated bandwidths",
        *table(
            ["ranks", "global batch", "memory", "step", "samples/s", "efficiency", "waits for"],
            [_scale_row(row) for row in plan.scales],
        ),
    ]


def _scale_row(row: Scale) -> list[str]:
    return [
        f"{row.ranks:,}",
        f"{row.global_batch:,}",
        size(row.memory_bytes),
        f"{row.step_seconds:.3g} s",
        f"{row.samples_per_second:,.0f}",
        f"{row.efficiency:.0%}",
        row.limit,
    ]
