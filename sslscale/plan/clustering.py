"""What k-means costs over any number of vectors on any number of devices: formulas over rates that are measured here.

N vectors of D dimensions in fp16, K clusters. A flat pass multiplies every vector with every centroid; the hierarchical
method (cluster/hierarchy.py) with sqrt(K) parents, and then with a few parents' worth of children near its own. The
driver gets the float64 sums of every part, or at large K once those of all parts, for which rows are read twice
(cluster/ranges.py); centroids go out once to a node.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sslscale.cluster.hierarchy import JOINT_NEAR, NEAR_PARENTS, num_parents, sample_limit
from sslscale.cluster.kernels import BLOCK_ROWS, NearestCentroid, Pass, accumulate, blocks
from sslscale.cluster.kmeans import check_num_clusters
from sslscale.cluster.ranges import RANGE_BYTES
from sslscale.cluster.tree import share_of
from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.plan.model import RANKS, Machine, check_rates
from sslscale.plan.text import duration, size, table
from sslscale.provenance import hardware
from sslscale.runtime.base import compute_threads

FP16, FP32, FP64, INT32 = 2, 4, 8, 4
ADDED = FP16 + 2 * FP32 + FP64  # bytes a value that adding up a row moves: read, in fp32 and back, in float64
PROBE_ROWS, PROBE_CLUSTERS = 2**17, 4096


@dataclass(frozen=True)
class Rates:
    """Of one device: what it can do, and which share of that the two inner loops of k-means reach."""

    matrix: float
    """FLOP/s of a large product."""
    memory: float
    """Bytes a second of a copy, read and written."""
    assign: float
    """Share of `matrix`, of finding the nearest centroid."""
    add: float
    """Share of `memory`, of adding up the rows of each cluster (ADDED bytes a value)."""

    def on(self, matrix: float | None, memory: float | None) -> Rates:
        """Of another device that is stated; the shares are taken to be those measured here."""
        return Rates(matrix or self.matrix, memory or self.memory, self.assign, self.add)


@dataclass(frozen=True)
class Vectors:
    """What is clustered."""

    rows: int
    dim: int
    clusters: int
    part_rows: int
    restarts: int = 1
    """Which go through the iterations together."""

    @property
    def parts(self) -> int:
        return math.ceil(self.rows / self.part_rows)

    @property
    def bytes(self) -> int:
        return self.rows * self.dim * FP16


@dataclass(frozen=True)
class Work:
    """One pass over vectors, of all devices together."""

    name: str
    flops: float
    """Of products with centroids."""
    added: float
    """Bytes moved to add rows up."""
    bytes_read: float
    """From the store."""
    bytes_received: float
    """By the driver."""
    bytes_sent: float
    """To every node."""
    worker_bytes: float
    """Held by one worker beside its imports."""
    driver_bytes: float
    """Held by the driver."""


@dataclass(frozen=True)
class PassTime:
    """A pass on so many devices, in seconds."""

    devices: int
    computing: float
    reading: float
    sending: float
    seconds: float
    limit: str
    """What it waits for: compute, store or driver (the network of its node)."""


def measure_rates(dim: int, num_clusters: int, threads: int) -> Rates:
    """Of this machine's processor with so many threads, by the kernels themselves on random rows (n, dim)."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((PROBE_ROWS, dim), dtype=np.float32).astype(np.float16)
    centroids = generator.standard_normal((min(num_clusters, PROBE_CLUSTERS), dim), dtype=np.float32)
    side = 2048
    square = generator.standard_normal((side, side), dtype=np.float32)
    copied = np.empty_like(rows, dtype=np.float32), np.empty_like(rows, dtype=np.float32)
    find = NearestCentroid(centroids)
    with compute_threads(threads):
        matrix = 2 * side**3 / _seconds(lambda: square @ square)
        memory = 2 * copied[0].nbytes / _seconds(lambda: np.copyto(*copied))
        assigning = _seconds(lambda: [find(x) for _, x in blocks(rows, "l2")])
        wanted = Pass.of(centroids[None])
        adding = max(_seconds(lambda: accumulate(rows, "l2", wanted)) - assigning, 0.05 * assigning)
    return Rates(
        matrix=matrix,
        memory=memory,
        assign=2 * len(rows) * len(centroids) * dim / assigning / matrix,
        add=ADDED * rows.size / adding / memory,
    )


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def flat_pass(vectors: Vectors) -> Work:
    """An exact iteration of Lloyd's, of all restarts; with one restart, or the final assignment."""
    return _pass("an exact pass", vectors, vectors.clusters)


def hierarchical_passes(vectors: Vectors) -> list[Work]:
    """An iteration over the parents, one over all samples that are split, one of all clusters, and the assignment.

    A split looks at `sample_limit` rows a parent, sqrt(K) children each; every row is then compared with all parents
    and with as many children as NEAR_PARENTS of them have, JOINT_NEAR while all clusters move.
    """
    parents = num_parents(vectors.clusters)
    children = vectors.clusters / parents
    sample = min(vectors.rows, parents * sample_limit(math.ceil(children)))
    centroids = vectors.clusters * vectors.dim * FP32

    def by_tree(work: Work, near: int) -> Work:
        """As a tree of the centroids does it (cluster/tree.py), which the driver makes of them in float64."""
        children = share_of(near, parents, vectors.clusters)
        tree = parents * children * INT32
        return replace(
            work,
            flops=2 * vectors.rows * (parents + children) * vectors.dim,
            bytes_sent=work.bytes_sent + tree,
            worker_bytes=work.worker_bytes + tree,
            driver_bytes=work.driver_bytes + 2 * centroids + tree,
        )

    split = Work(
        "an iteration of the splits",
        flops=2 * sample * children * vectors.dim,
        added=ADDED * sample * vectors.dim,
        bytes_read=0,  # once, before the first: the rows of a parent are held
        bytes_received=0,
        bytes_sent=0,
        worker_bytes=sample / parents * vectors.dim * FP32,
        driver_bytes=0,
    )
    assign = Work(
        "the assignment",
        flops=0,  # of the tree
        added=ADDED * vectors.rows * vectors.dim,
        bytes_read=vectors.bytes,
        bytes_received=0,
        bytes_sent=centroids,
        worker_bytes=centroids + vectors.part_rows * (FP64 + FP32 + FP64),
        driver_bytes=2 * centroids,
    )
    joint = _pass("an iteration of all clusters", replace(vectors, restarts=1), vectors.clusters)
    passes = [_pass("an iteration of the parents", vectors, parents), split]
    return [*passes, by_tree(joint, JOINT_NEAR), by_tree(assign, NEAR_PARENTS)]


def _pass(name: str, vectors: Vectors, clusters: int) -> Work:
    centroids = vectors.restarts * clusters * vectors.dim * FP32
    sums = vectors.restarts * clusters * (vectors.dim + 1) * FP64
    by_range = clusters * vectors.dim * FP64 > RANGE_BYTES
    own = RANGE_BYTES if by_range else sums  # what a worker adds up at a time
    return Work(
        name,
        flops=2 * vectors.restarts * vectors.rows * clusters * vectors.dim,
        added=ADDED * vectors.restarts * vectors.rows * vectors.dim,
        bytes_read=(2 * vectors.restarts if by_range else 1) * vectors.bytes,
        bytes_received=sums if by_range else vectors.parts * sums,
        bytes_sent=centroids,
        worker_bytes=2 * centroids + own + BLOCK_ROWS * vectors.dim * (FP16 + FP32 + FP64),
        driver_bytes=2 * centroids + sums + own,
    )


def pass_time(work: Work, rates: Rates, machine: Machine, devices: int) -> PassTime:
    """Reading and computing go side by side, and parts' sums arrive meanwhile; centroids go out before."""
    computing = work.flops / (devices * rates.matrix * rates.assign) + work.added / (devices * rates.memory * rates.add)
    reading = work.bytes_read / machine.store
    receiving = work.bytes_received / machine.network
    longest = max(computing, reading, receiving)
    limit = "compute" if longest == computing else "store" if longest == reading else "driver"
    sending = work.bytes_sent / machine.network
    return PassTime(devices, computing, reading, receiving + sending, longest + sending, limit)


def run_clustering_plan(
    config: RunConfig,
    shape: str,
    machine: Machine,
    *,
    matrix: float | None = None,
    memory: float | None = None,
) -> dict[str, Any]:
    """Plans k-means by `config.cluster` and `config.embed.part_rows` over vectors of a shape such as "1000000000x384".

    `matrix` (FLOP/s) and `memory` (bytes a second) are those of the device that will compute; without them it is this
    machine's processor. UserError for a shape or a rate that is none, and without a section cluster.
    """
    if config.cluster is None:
        raise UserError("the config has no cluster section", fix="say cluster.num_clusters=1000000, for example")
    numbers = config.cluster.num_clusters
    clusters = max(numbers) if isinstance(numbers, list) else numbers
    check_rates(matrix=matrix, memory=memory)
    vectors = Vectors(*_shape(shape), clusters, config.embed.part_rows, config.cluster.num_init)
    check_num_clusters(clusters, vectors.rows)
    here = measure_rates(vectors.dim, clusters, config.runtime.threads)
    rates = here.on(matrix, memory)
    passes = [flat_pass(vectors), *hierarchical_passes(vectors)]
    return {
        "vectors": asdict(vectors),
        "measured": {"processor": hardware()["cpu"], "threads": config.runtime.threads, **asdict(here)},
        "device": {"matrix": rates.matrix, "memory": rates.memory},
        "machine": asdict(machine),
        "passes": [
            {**asdict(work), "devices": [asdict(pass_time(work, rates, machine, number)) for number in RANKS]}
            for work in passes
        ],
    }


def _shape(given: str) -> tuple[int, int]:
    rows, _, dim = given.lower().partition("x")
    if not (rows.isdecimal() and dim.isdecimal() and int(rows) and int(dim)):
        raise UserError("--vectors is not a shape", got=given, allowed="ROWSxDIM, such as 1000000000x384")
    return int(rows), int(dim)


def clustering_lines(plan: dict[str, Any]) -> list[str]:
    """The plan as a user reads it."""
    vectors, measured, device = Vectors(**plan["vectors"]), plan["measured"], plan["device"]
    shown = ("bytes_read", "bytes_received", "bytes_sent", "worker_bytes", "driver_bytes")
    matrix, memory = f"{measured['matrix'] / 1e9:,.0f} GFLOP/s", f"{measured['memory'] / 1e9:,.1f} GB/s"
    return [
        f"vectors    {vectors.rows:,} x {vectors.dim} in fp16, {size(vectors.bytes)} in {vectors.parts:,} parts;"
        f" {vectors.clusters:,} clusters, restarts: {vectors.restarts}",
        f"measured   {measured['processor']}, threads: {measured['threads']}: {matrix} of a product,"
        f" {measured['assign']:.0%} of it in finding the nearest centroid; {memory} of a copy,"
        f" {measured['add']:.0%} of it in adding rows up",
        f"device     {device['matrix'] / 1e9:,.0f} GFLOP/s, {device['memory'] / 1e9:,.1f} GB/s, the same shares",
        "",
        *table(
            ["pass over all devices", "FLOP", "read", "driver gets", "node gets", "worker holds", "driver holds"],
            [[work["name"], f"{work['flops']:.2g}"] + [size(work[key]) for key in shown] for work in plan["passes"]],
        ),
        "",
        "time of a pass, and what it waits for",
        *table(
            ["devices", *(work["name"] for work in plan["passes"])],
            [
                [f"{number:,}"]
                + [
                    f"{duration(work['devices'][at]['seconds'])} {work['devices'][at]['limit']}"
                    for work in plan["passes"]
                ]
                for at, number in enumerate(RANKS)
            ],
        ),
    ]
