from __future__ import annotations

import dataclasses

import pytest

from sslscale.plan.model import Machine, Measured, memory, optimizer_bytes, scale, states, step_traffic

GIB = 2**30
# A billion parameters, all trained by AdamW; one rank held 20 GB at ZeRO 0 and took a second for 64 samples.
MEASURED = Measured(
    ranks=1,
    parameters=10**9,
    trained=10**9,
    state_values=2.0,
    zero_stage=0,
    offloaded=False,
    peak_bytes=20 * 10**9,
    step_seconds=1.0,
    warming_seconds=3.0,
    samples=64,
    sample_bytes=10**5,
    checkpoint_bytes=12 * 10**9,
    start_seconds=10.0,
)
MACHINE = Machine(ranks_per_node=8, link=100e9, network=50e9, store=20e9)


@pytest.mark.parametrize(
    ("stage", "ranks", "gigabytes"),
    [(0, 64, 4 + 4 + 8), (1, 64, 4 + 4 + 12 / 64), (2, 64, 4 + 16 / 64), (3, 64, 20 / 64), (1, 1, 20), (3, 1, 20)],
)
def test_states_by_zero_stage(stage: int, ranks: int, gigabytes: float) -> None:
    assert states(MEASURED, stage, ranks).total == pytest.approx(gigabytes * 1e9)


def test_an_optimizer_in_the_nodes_memory_takes_none_of_the_devices() -> None:
    offloaded = dataclasses.replace(MEASURED, zero_stage=1, offloaded=True, peak_bytes=12 * 10**9)
    assert states(offloaded, 1, 4).optimizer == 0 and states(offloaded, 0, 4).optimizer == 8e9
    assert optimizer_bytes(offloaded, 1, 4) == 12e9 / 4
    assert memory(offloaded, 1, 4).activations == 4e9


def test_what_is_not_state_stays_with_the_rank() -> None:
    assert memory(MEASURED, 0, 1).total == MEASURED.peak_bytes
    for stage in range(4):
        assert memory(MEASURED, stage, 8).activations == 4e9
    assert memory(MEASURED, 3, 1000).total == pytest.approx(4e9 + 20e9 / 1000)


def test_frozen_parameters_have_no_states() -> None:
    frozen = dataclasses.replace(MEASURED, trained=0)
    assert states(frozen, 1, 4).total == 4e9
    assert step_traffic(frozen, 1, 4) == 0


def test_a_ring_sends_twice_what_stage_3_sends_thrice() -> None:
    assert step_traffic(MEASURED, 1, 1) == 0
    assert step_traffic(MEASURED, 1, 4) == 2 * 4e9 * 3 / 4
    assert step_traffic(MEASURED, 3, 4) == 3 * 4e9 * 3 / 4


def test_a_thousand_ranks_share_the_networks_of_their_nodes() -> None:
    alone, node, many = (scale(MEASURED, MACHINE, 1, ranks) for ranks in (1, 8, 1000))
    assert (alone.step_seconds, alone.efficiency, alone.limit) == (1.0, 1.0, "compute")
    assert node.step_seconds == pytest.approx(1 + 8e9 * 7 / 8 / 100e9)
    assert many.step_seconds == pytest.approx(1 + 8e9 * 0.999 / (50e9 / 8))
    assert many.limit == "network"
    assert many.global_batch == 64_000
    assert many.samples_per_second == pytest.approx(64_000 / many.step_seconds)


def test_ranks_that_were_measured_together_have_their_sending_and_their_shares_in_the_figures() -> None:
    together = dataclasses.replace(MEASURED, ranks=8, zero_stage=1, peak_bytes=round((8 + 12 / 8 + 4) * 1e9))
    assert scale(together, MACHINE, 1, 8).step_seconds == 1.0
    more = 8e9 * 0.999 / (50e9 / 8) - 8e9 * 7 / 8 / 100e9
    assert scale(together, MACHINE, 1, 1000).step_seconds == pytest.approx(1 + more)
    assert scale(together, MACHINE, 1, 2).step_seconds == 1.0, "fewer ranks are not promised to be faster"
    assert memory(together, 1, 8).total == pytest.approx(together.peak_bytes)
    assert memory(together, 0, 8).total == pytest.approx((16 + 4) * 1e9)


def test_a_slow_store_holds_all_ranks_up() -> None:
    slow = dataclasses.replace(MACHINE, store=1e9)
    held = scale(MEASURED, slow, 1, 1000)
    assert held.limit == "store"
    assert held.samples_per_second == pytest.approx(1e9 / 1e5)
