"""What training costs at any number of ranks: formulas over a few measured figures and stated bandwidths.

Memory follows Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(https://arxiv.org/abs/1910.02054), section 3, with what this project keeps: fp32 parameters and AdamW's two fp32
moments. Communication is that of ring collectives: each rank sends and receives (N - 1) / N of the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sslscale.errors import UserError

FP32 = 4
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)  # that a plan shows


@dataclass(frozen=True)
class Measured:
    """What a short run showed, its ranks on the batch that a rank has in the run that is planned."""

    ranks: int
    """Of the short run, side by side on one machine."""
    parameters: int
    trained: int
    """Parameters with a gradient."""
    state_values: float
    """fp32 values that the optimizer keeps for a trained parameter: 2 of AdamW, 1 of SGD with momentum."""
    zero_stage: int
    offloaded: bool
    """Whether the optimizer's share lies in the node's memory, and not in the device's."""
    peak_bytes: int
    """Of the largest rank, above what its imports take."""
    step_seconds: float
    """Median, reading, views and what these ranks send each other included."""
    warming_seconds: float
    """What the first steps took longer than the later ones."""
    samples: int
    """Of one rank in a step."""
    sample_bytes: float
    """Read from the shards for one sample."""
    checkpoint_bytes: int
    start_seconds: float
    """From the start of a rank to its first step."""


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes a second, stated, not measured. UserError for one that is not above zero."""

    ranks_per_node: int
    link: float
    """Between two ranks of a node, each way."""
    network: float
    """Of one node, each way: its ranks share it."""
    store: float
    """What the store of the shards and checkpoints gives all nodes together."""

    def __post_init__(self) -> None:
        check_rates(link=self.link, network=self.network, store=self.store)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Scale:
    """One number of ranks, each with the batch that was measured."""

    ranks: int
    global_batch: int
    memory_bytes: float
    step_seconds: float
    samples_per_second: float
    efficiency: float
    """Of a rank, against those that were measured."""
    limit: str
    """What a step waits for: compute, network or store."""


def check_rates(**stated: float | None) -> None:
    """UserError for a stated rate that is not above zero; None is measured."""
    for name, rate in stated.items():
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"--{name} is a rate", got=rate, allowed="above 0")


def states(measured: Measured, zero_stage: int, ranks: int) -> Memory:
    """Parameters, gradients and optimizer of one rank; no activations.

    From stage 2 on DeepSpeed partitions gradients, in stage 3 parameters; for the optimizer see `optimizer_bytes`.
    """
    share = 1.0 / ranks
    beside = measured.offloaded and zero_stage > 0
    return Memory(
        parameters=FP32 * measured.parameters * (share if zero_stage == 3 else 1.0),
        gradients=FP32 * measured.trained * (share if zero_stage >= 2 else 1.0),
        optimizer=0.0 if beside else optimizer_bytes(measured, zero_stage, ranks),
        activations=0.0,
    )


def optimizer_bytes(measured: Measured, zero_stage: int, ranks: int) -> float:
    """The moments of one rank and, from stage 1 on, its share of them and of a master copy of trained parameters."""
    moments = FP32 * measured.state_values * measured.trained
    return (FP32 * measured.trained + moments) / ranks if zero_stage else moments


def memory(measured: Measured, zero_stage: int, ranks: int) -> Memory:
    """Of one of `ranks` ranks: its states, and what the measured ranks had beside theirs."""
    own = states(measured, zero_stage, ranks)
    beside = measured.peak_bytes - states(measured, measured.zero_stage, measured.ranks).total
    return Memory(own.parameters, own.gradients, own.optimizer, max(beside, 0.0))


def step_traffic(measured: Measured, zero_stage: int, ranks: int) -> float:
    """Bytes that one rank sends in a step (and as many that it receives).

    An all-reduce is a reduce-scatter and an all-gather. Stage 3 gathers the parameters in the forward, again in the
    backward, and reduces the gradients: half as much again (section 7 of the paper).
    """
    rounds = 3 if zero_stage == 3 else 2
    return rounds * FP32 * measured.trained * (ranks - 1) / ranks


def sending_seconds(measured: Measured, machine: Machine, zero_stage: int, ranks: int) -> float:
    """What the collectives of a step take: over the links of a node, or over a rank's share of its network."""
    path = machine.link if ranks <= machine.ranks_per_node else machine.network / machine.ranks_per_node
    return step_traffic(measured, zero_stage, ranks) / path


def scale(measured: Measured, machine: Machine, zero_stage: int, ranks: int) -> Scale:
    """A step of `ranks` ranks, weak scaling: the longest of computing with what it sends, and what the store gives.

    The measured step has its own ranks' sending in it; what more ranks send beyond that is added, not hidden behind
    computing: the worst case, which DeepSpeed's overlap only improves.
    """
    within = sending_seconds(measured, machine, measured.zero_stage, measured.ranks)
    sending = sending_seconds(measured, machine, zero_stage, ranks)
    reading = ranks * measured.samples * measured.sample_bytes / machine.store
    working = measured.step_seconds + max(0.0, sending - within)
    seconds = max(working, reading)
    limit = "store" if reading > working else "network" if sending > working / 2 else "compute"
    return Scale(
        ranks=ranks,
        global_batch=ranks * measured.samples,
        memory_bytes=memory(measured, zero_stage, ranks).total,
        step_seconds=seconds,
        samples_per_second=ranks * measured.samples / seconds,
        efficiency=measured.step_seconds / seconds,
        limit=limit,
    )
