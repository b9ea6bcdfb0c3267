from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from sslscale.cli import app
from sslscale.cluster.kernels import Totals
from sslscale.config import load_config
from sslscale.errors import UserError
from sslscale.plan.clustering import (
    Rates,
    Vectors,
    clustering_lines,
    flat_pass,
    hierarchical_passes,
    measure_rates,
    pass_time,
    run_clustering_plan,
)
from sslscale.plan.model import RANKS, Machine

VECTORS = Vectors(rows=10**9, dim=384, clusters=10**6, part_rows=2**18)
MACHINE = Machine(ranks_per_node=8, link=100e9, network=50e9, store=20e9)
RATES = Rates(matrix=1e14, memory=1e12, assign=0.5, add=0.5)


def test_a_flat_pass_multiplies_every_vector_with_every_centroid() -> None:
    work = flat_pass(VECTORS)
    assert work.flops == 2 * 10**9 * 10**6 * 384
    assert work.bytes_sent == 10**6 * 384 * 4
    # so many sums are added up by ranges of centroids: sent once, for rows that are read twice
    assert work.bytes_read == 2 * 10**9 * 384 * 2
    assert work.bytes_received == 10**6 * 385 * 8
    few = flat_pass(dataclasses.replace(VECTORS, clusters=1000))
    assert few.bytes_read == 10**9 * 384 * 2
    assert few.bytes_received == 3815 * 1000 * 385 * 8


def test_restarts_go_through_a_pass_together() -> None:
    few = dataclasses.replace(VECTORS, clusters=1000)
    for shape, reads in ((VECTORS, 5), (few, 1)):  # by ranges of centroids, each restart reads the rows by itself
        one, five = flat_pass(shape), flat_pass(dataclasses.replace(shape, restarts=5))
        assert five.bytes_read == reads * one.bytes_read
        for name in ("flops", "added", "bytes_received", "bytes_sent"):
            assert getattr(five, name) == 5 * getattr(one, name), name
    assert five.driver_bytes > 4 * one.driver_bytes


def test_the_driver_gets_what_the_workers_of_kmeans_send() -> None:
    import numpy as np

    sent = Totals.zero(np.zeros((1, 1000, 16), dtype=np.float32))
    small = dataclasses.replace(VECTORS, rows=100, dim=16, clusters=1000)
    assert flat_pass(small).bytes_received == sent.sums.nbytes + sent.counts.nbytes


def test_the_hierarchy_compares_with_parents_and_near_children() -> None:
    parents, split, joint, assign = hierarchical_passes(VECTORS)
    assert parents.flops == 2 * 10**9 * 1000 * 384
    assert split.flops == 2 * (1000 * 256 * 1000) * 1000 * 384
    assert assign.flops == 2 * 10**9 * (1000 + 32 * 1000) * 384
    assert joint.flops == 2 * 10**9 * (1000 + 16 * 1000) * 384
    tree = 1000 * 32 * 1000 * 4  # each parent's candidates
    assert assign.bytes_sent == 10**6 * 384 * 4 + tree and assign.driver_bytes > 10**6 * 384 * 8 + tree
    assert joint.bytes_received == flat_pass(VECTORS).bytes_received > assign.bytes_received == 0


def test_a_pass_waits_for_the_slowest() -> None:
    work = flat_pass(VECTORS)
    one, many = (pass_time(work, RATES, MACHINE, devices) for devices in (1, 512))
    assert one.limit == "compute"
    assert one.computing == pytest.approx(work.flops / 0.5e14 + work.added / 0.5e12)
    assert one.seconds == pytest.approx(one.computing + work.bytes_sent / 50e9)
    assert (many.limit, many.computing) == ("store", pytest.approx(one.computing / 512))
    assert many.seconds == pytest.approx(work.bytes_read / 20e9 + work.bytes_sent / 50e9)
    slow = dataclasses.replace(MACHINE, network=1e7)
    assert pass_time(work, RATES, slow, 512).limit == "driver"
    parents = hierarchical_passes(VECTORS)[0]
    assert pass_time(parents, RATES, MACHINE, 512).limit == "store"


def test_rates_are_measured_and_another_device_has_the_same_shares() -> None:
    rates = measure_rates(16, 64, 1)
    assert rates.matrix > 1e8
    assert 0 < rates.assign < 1.5
    assert rates.add > 0
    assert rates.on(1e15, None) == dataclasses.replace(rates, matrix=1e15)


def test_the_command_plans_without_any_data() -> None:
    command = ["plan", "--vectors", "1000000x16", "--matrix", "400", "--json", "cluster.num_clusters=10000"]
    found = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout.splitlines()[-1])
    assert found["device"]["matrix"] == 4e14
    assert [len(work["devices"]) for work in found["passes"]] == [len(RANKS)] * 5
    told = "\n".join(clustering_lines(found))
    assert "10,000 clusters" in told
    assert "driver gets" in told


@pytest.mark.parametrize("shape", ["1000", "0x4", "ax4", "10x", "10x4x2"])
def test_a_shape_that_is_none_is_refused(shape: str) -> None:
    with pytest.raises(UserError, match="not a shape"):
        run_clustering_plan(load_config(None, ["cluster.num_clusters=2"]), shape, MACHINE)


def test_more_clusters_than_vectors_are_refused() -> None:
    with pytest.raises(UserError, match="more clusters than samples"):
        run_clustering_plan(load_config(None, ["cluster.num_clusters=20"]), "10x4", MACHINE)
