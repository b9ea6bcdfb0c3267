from __future__ import annotations

import numpy as np
import pytest

from sslscale.shards.plan import Span, block_permutation, plan_parts, plan_stream

COUNTS = [5, 0, 17, 1, 8, 30]


def ids(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.shard, record) for span in spans for record in range(span.start, span.stop)]


EVERY = sorted((shard, record) for shard, count in enumerate(COUNTS) for record in range(count))


@pytest.mark.parametrize("num_streams", [1, 3, 4, 7, 61])
def test_every_sample_is_in_exactly_one_stream_and_streams_differ_by_at_most_one(num_streams):
    plan = [plan_stream(COUNTS, 3, 2, stream, num_streams) for stream in range(num_streams)]
    assert sorted(pair for spans in plan for pair in ids(spans)) == EVERY
    lengths = [sum(map(len, spans)) for spans in plan]
    assert max(lengths) - min(lengths) <= 1
    assert all(len(span) > 0 for spans in plan for span in spans)


def test_the_plan_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[Span]:
        return plan_stream(range(1, 40), seed, epoch, 0, 1)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_the_permutations_are_the_same_on_every_platform():
    assert block_permutation(8, seed=1, epoch=2, stream=3, block=4).tolist() == [6, 2, 0, 4, 5, 7, 3, 1]
    assert [span.shard for span in plan_stream([1] * 8, 1, 2, 0, 1)] == [2, 5, 6, 1, 7, 4, 0, 3]


def test_blocks_are_permuted_differently():
    orders = {
        tuple(block_permutation(64, 0, epoch, stream, block))
        for epoch in range(2)
        for stream in range(2)
        for block in range(2)
    }
    assert len(orders) == 8
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_a_shuffled_block_is_close_to_uniform():
    means = np.mean([block_permutation(100, seed, 0, 0, 0) for seed in range(400)], axis=0)
    assert np.abs(means - 49.5).max() < 6  # standard error 1.44


@pytest.mark.parametrize("part_rows", [1, 7, 30, 61, 1000])
def test_parts_hold_every_sample_once_in_order_and_are_full_but_the_last(part_rows):
    parts = plan_parts(COUNTS, part_rows)
    assert [pair for spans in parts for pair in ids(spans)] == EVERY
    rows = [sum(map(len, spans)) for spans in parts]
    assert set(rows[:-1]) <= {part_rows}
    assert 0 < rows[-1] <= part_rows


def test_appended_shards_leave_the_full_parts_alone():
    assert plan_parts([*COUNTS, 100], 10)[:6] == plan_parts(COUNTS, 10)[:6]


def test_no_shards_are_no_parts():
    assert plan_parts([], 10) == []
    assert plan_parts([0, 0], 10) == []
