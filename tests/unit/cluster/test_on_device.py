"""The kernels of a GPU on torch's CPU device, against those of the processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslscale.cluster import on_device
from sslscale.cluster.kernels import Pass, accumulate, nested_sample
from sslscale.cluster.kmeans import _assign
from sslscale.cluster.lloyd import ArrayRows, lloyd
from sslscale.cluster.on_device import DeviceKernels
from sslscale.cluster.ranges import find_labels
from sslscale.cluster.seeding import initial_state

CPU = torch.device("cpu")


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(12, 6)) + 5
    return (centres[generator.integers(0, 12, 1000)] + 0.2 * generator.normal(size=(1000, 6))).astype(np.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, value in {"BLOCK_ROWS": 300, "TILE_ROWS": 64, "TILE_CENTROIDS": 5}.items():
        monkeypatch.setattr(on_device, name, value)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_totals_are_those_of_the_processor(rows, metric, weighted):
    weights = np.random.default_rng(1).uniform(0.5, 2, len(rows)) if weighted else None
    centroids = rows[np.random.default_rng(2).permutation(1000)[:24]].reshape(2, 12, 6).astype(np.float32)
    wanted = Pass(centroids, np.array([1.0, 0.5]), [None, None])
    expected = accumulate(rows, metric, wanted, weights, seed=3)
    found = DeviceKernels(CPU).accumulate(rows, metric, wanted, weights, seed=3)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-6)
    np.testing.assert_allclose(found.counts, expected.counts, rtol=1e-12)
    np.testing.assert_allclose(found.squares, expected.squares, rtol=1e-6)
    if metric == "l2" and not weighted:  # fp16 sums are exact in any order
        np.testing.assert_array_equal(found.sums, expected.sums)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_labels_are_those_of_the_processor(rows, share):
    wanted = Pass.of(rows[:24].reshape(2, 12, 6).astype(np.float32), share)
    sample = nested_sample(len(rows), share, 3)
    expected = find_labels(rows, "l2", wanted, 1, sample)
    found = DeviceKernels(CPU).find_labels(rows, "l2", wanted, 1, sample)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-12)


def test_assignments_are_those_of_the_processor(rows):
    centroids = rows[:12].astype(np.float32)
    expected, found = _assign(rows, "l2", centroids), _assign(rows, "l2", centroids, DeviceKernels(CPU))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
    equal = np.ones((3, 6), np.float32)
    assert (_assign(rows, "l2", equal, DeviceKernels(CPU))[0] == 0).all(), "ties go to the lowest index"


def test_rows_with_a_name_are_kept_while_there_is_room(rows):
    kernels, centroids = DeviceKernels(CPU, keep_bytes=rows.nbytes), rows[:3].astype(np.float32)
    before = kernels.assign(rows, "l2", centroids, name=0)[0]
    other = rows[::-1].copy()
    np.testing.assert_array_equal(kernels.assign(other, "l2", centroids, name=0)[0], before)  # the kept ones
    np.testing.assert_array_equal(kernels.assign(other, "l2", centroids, name=1)[0], before[::-1])  # no room: brought
    np.testing.assert_array_equal(kernels.assign(other, "l2", centroids)[0], before[::-1])


def test_rows_that_are_not_kept_are_brought_by_the_block(rows, monkeypatch):
    copy, brought = torch.tensor, []
    monkeypatch.setattr(torch, "tensor", lambda own, **where: brought.append(len(own)) or copy(own, **where))
    kernels, centroids = DeviceKernels(CPU, keep_bytes=rows.nbytes), rows[:12].astype(np.float32)
    expected = _assign(rows, "l2", centroids)
    for name, lengths in (
        (None, [300, 300, 300, 100]),
        ("kept", [1000]),
        ("kept", []),
        ("other", [300, 300, 300, 100]),
    ):
        found = _assign(rows, "l2", centroids, kernels, name)
        np.testing.assert_array_equal(found[0], expected[0])
        assert brought == lengths
        brought.clear()


def test_float64_rows_are_searched_in_their_own_precision():
    generator = np.random.default_rng(0)
    centroids = np.concatenate([1e-3 * generator.normal(size=(9, 4)), np.full((3, 4), 100.0)])
    x = centroids[generator.integers(0, 9, 500)] + 1e-4 * generator.normal(size=(500, 4))
    expected = ((x[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(_assign(x, "l2", centroids, DeviceKernels(CPU))[0], expected)
    found = DeviceKernels(CPU).find_labels(x, "l2", Pass.of(centroids[None]), 0, slice(None))
    np.testing.assert_array_equal(found[0], expected)


def test_whole_runs_agree(rows):
    settings = {"metric": "l2", "max_iterations": 10, "tolerance": 0.0}
    cpu, device = (
        lloyd(own, initial_state(own, 12, "random", 2, seed=0), **settings)
        for own in (ArrayRows(rows, "l2"), ArrayRows(rows, "l2", on_device=DeviceKernels(CPU)))
    )
    np.testing.assert_array_equal(cpu.centroids, device.centroids)
    np.testing.assert_allclose(cpu.objective, device.objective, rtol=1e-12)
