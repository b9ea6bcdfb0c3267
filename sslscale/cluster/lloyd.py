"""Lloyd's algorithm over rows that somebody else holds: an array here, the parts of a feature store on workers there.

Restarts run side by side, so that each iteration is one pass over the rows. Under "cosine" the rows have unit length
and a centroid is the normalised mean (spherical k-means, Dhillon and Modha, 2001); all else is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from sslscale.cluster.kernels import Farthest, Pass, Shortcut, Totals, accumulate, farthest
from sslscale.features import sample_positions
from sslscale.features.distance import prepare
from sslscale.features.files import replacing
from sslscale.runtime.base import compute_threads

if TYPE_CHECKING:
    from sslscale.cluster.on_device import DeviceKernels  # it imports torch

SAMPLE_PER_CLUSTER = 256  # rows a cluster that initial centroids are chosen from, as in faiss
FIRST_PER_CLUSTER = 32  # rows a cluster that the first iterations look at
MIN_SAMPLE = 16384
CHUNK_ROWS = 65536  # of an array, that one thread adds up at a time

# Below these a full product costs no more than the projection of the rows.
PROJECTED_CLUSTERS, PROJECTED_DIM = 256, 128
ENERGY = 0.85  # of the centroids' variance, that the projections of a shortcut hold
STEP_TOLERANCE = 0.004  # relative fall of the objective that ends the iterations on a sample

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """How iterations look at the rows: a share of them, exactly or by a shortcut (kernels.Shortcut)."""

    share: float
    exact: bool


EXACT = Step(1.0, exact=True)


def schedule(method: str, num_rows: int, dim: int, num_clusters: int) -> list[Step]:
    """The steps of "lloyd" (exact from the first iteration) or of "minibatch".

    "minibatch" begins on a random sample that doubles once it has taught what it can (nested mini-batches: Newling
    and Fleuret, 2016, https://arxiv.org/abs/1602.02934), and, where clusters and dimensions are many, with
    assignments by a shortcut (which a GPU does not take). It ends with Lloyd's exact iterations over all rows.
    """
    if method == "lloyd":
        return [EXACT]
    shares = [1.0]
    while shares[0] / 2 * num_rows >= max(FIRST_PER_CLUSTER * num_clusters, MIN_SAMPLE):
        shares.insert(0, shares[0] / 2)
    if num_clusters >= PROJECTED_CLUSTERS and dim >= PROJECTED_DIM:
        return [*(Step(share, exact=False) for share in shares), EXACT]
    return [Step(share, exact=True) for share in shares]


class Rows(Protocol):
    """N rows, seen only through sums, the few farthest, and one bounded sample."""

    num_rows: int

    def totals(self, wanted: Pass) -> Totals:
        """Of the rows that each restart looks at."""
        ...

    def farthest(self, wanted: Pass, count: int, draw: int | None = None) -> Farthest:
        """The `count` rows farthest from their centroid, or drawn so, for the one restart of `wanted`."""
        ...

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """`min(size, N)` prepared rows without replacement, in row order, and their weights."""
        ...


class ArrayRows:
    """Rows in an array (n, D), added up in chunks by `threads` threads; how many does not change a bit.

    With `on_device` they are added up there instead.
    """

    def __init__(
        self,
        x: np.ndarray,
        metric: str,
        weights: np.ndarray | None = None,
        threads: int = 1,
        on_device: DeviceKernels | None = None,
    ) -> None:
        self.x, self.metric, self.weights = x, metric, weights
        self.threads, self.on_device = threads if on_device is None else 1, on_device
        self.num_rows = len(x)

    def totals(self, wanted: Pass) -> Totals:
        def add_up(rows: np.ndarray, weights: np.ndarray | None, at: int) -> Totals:
            if self.on_device is not None:
                return self.on_device.accumulate(rows, self.metric, wanted, weights, at, name=at)
            return accumulate(rows, self.metric, wanted, weights, at)

        total = Totals.zero(wanted.centroids)
        for chunk in self._chunks(add_up):
            total.add(chunk)
        return total

    def farthest(self, wanted: Pass, count: int, draw: int | None = None) -> Farthest:
        return Farthest.merge(
            self._chunks(lambda rows, weights, at: farthest(rows, self.metric, wanted, count, weights, at, draw)), count
        )

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        at = sample_positions(self.num_rows, size, seed)
        return prepare(self.x[at], self.metric), np.ones(len(at)) if self.weights is None else self.weights[at]

    def _chunks(self, work: Callable[[np.ndarray, np.ndarray | None, int], T]) -> Iterator[T]:
        """`work(rows, weights, number of the chunk)` over all chunks, results in order."""

        def one(start: int) -> T:
            here = slice(start, start + CHUNK_ROWS)
            return work(self.x[here], None if self.weights is None else self.weights[here], start // CHUNK_ROWS)

        starts = range(0, self.num_rows, CHUNK_ROWS)
        if self.threads == 1 or len(starts) == 1:
            yield from map(one, starts)
            return
        with compute_threads(1), ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(one, starts)


@dataclass
class LloydState:
    """All that the next iteration depends on."""

    centroids: np.ndarray  # (R, K, D)
    objective: np.ndarray  # (R,) float64, at the last pass; inf before the first
    active: np.ndarray  # (R,) bool
    iterations: np.ndarray  # (R,) int64, updates made so far
    steps: np.ndarray  # (R,) int64, where each is in the schedule
    passes: int = 0  # over the rows

    @property
    def best(self) -> int:
        """The restart with the lowest objective, the first of equals."""
        return int(np.argmin(self.objective))

    def save(self, path: Path) -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> LloydState:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(**{**arrays, "passes": int(arrays["passes"])})

    @classmethod
    def start(cls, centroids: np.ndarray) -> LloydState:
        """Before the first pass, at centroids (R, K, D)."""
        zeros = np.zeros(len(centroids), dtype=np.int64)
        return cls(centroids, np.full(len(centroids), np.inf), zeros == 0, zeros, zeros.copy())


def lloyd(
    rows: Rows,
    state: LloydState,
    *,
    metric: str,
    max_iterations: int,
    tolerance: float,
    steps: Sequence[Step] = (EXACT,),
    checkpoint: Callable[[LloydState], None] = lambda state: None,
) -> LloydState:
    """Iterates until every restart has converged in the last step, or has made `max_iterations` updates.

    A restart has converged when its objective falls by at most `tolerance` times itself and no cluster is empty that
    a row could fill. An earlier step ends the same way, on a sample at STEP_TOLERANCE; every restart ends with a pass
    of the last step, so that objectives compare. `checkpoint(state)` is called after every pass; going on from a saved
    state gives the same bits.
    """
    last = len(steps) - 1
    while state.active.any():
        running = np.flatnonzero(state.active)
        wanted = _look([steps[step] for step in state.steps[running]], state.centroids[running])
        totals = rows.totals(wanted)
        objective = totals.objective(wanted.centroids) / wanted.shares
        for at, restart in enumerate(running):
            before, now = state.objective[restart], objective[at]
            step = state.steps[restart]
            at_last = step == last
            enough = tolerance if steps[step].share == 1 else max(tolerance, STEP_TOLERANCE)
            fell = now > 0 if np.isinf(before) else before - now > enough * before
            state.objective[restart] = now
            spent = state.iterations[restart] >= max_iterations
            going_on = not spent and (_refill_empty(rows, totals, at, wanted) or fell)
            state.active[restart] = going_on or not at_last
            if not going_on and not at_last:
                following = last if spent else step + 1
                if steps[following].share != steps[step].share:
                    state.objective[restart] = np.inf  # of other rows
                state.steps[restart] = following
            if state.active[restart] and not spent:
                own = wanted.centroids[at]
                state.centroids[restart] = _update(totals.sums[at], totals.counts[at], own, metric)
                state.iterations[restart] += 1
        state.passes += 1
        checkpoint(state)
    return state


def _look(steps: Sequence[Step], centroids: np.ndarray) -> Pass:
    shortcuts = [None if step.exact else Shortcut.of(own, ENERGY) for step, own in zip(steps, centroids, strict=True)]
    return Pass(centroids, np.array([step.share for step in steps]), shortcuts)


def _update(sums: np.ndarray, counts: np.ndarray, before: np.ndarray, metric: str) -> np.ndarray:
    """The means (K, D) of the clusters, normalised under "cosine"; a cluster without any stays where it was."""
    scale = np.linalg.norm(sums, axis=1) if metric == "cosine" else counts
    return np.where(scale[:, None] > 0, sums / np.where(scale > 0, scale, 1)[:, None], before).astype(before.dtype)


def _refill_empty(rows: Rows, totals: Totals, at: int, wanted: Pass) -> bool:
    """Gives each empty cluster the row farthest from its own centroid, taken out of its cluster's sum.

    The rows are chosen as scikit-learn chooses them. Rows at distance 0 stay (fewer distinct rows than clusters), and
    so does the last row of a cluster. True if a cluster was filled.
    """
    sums, counts = totals.sums[at], totals.counts[at]
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return False
    share = wanted.shares[at]
    if wanted.shortcuts[at] is not None or share < 1:  # far rows of a sample will do while nothing else is exact
        share = min(share, MIN_SAMPLE / rows.num_rows)
    found = rows.farthest(Pass(wanted.centroids[at : at + 1], np.array([share]), [wanted.shortcuts[at]]), len(empty))
    filled = 0
    for squared, donor, row, weight in zip(found.squared, found.labels, found.rows, found.weights, strict=True):
        if squared > 0 and 0 < weight < counts[donor]:
            cluster, value = empty[filled], weight * row.astype(np.float64)
            sums[donor] -= value
            counts[donor] -= weight
            sums[cluster], counts[cluster] = value, weight
            filled += 1
    return filled > 0
