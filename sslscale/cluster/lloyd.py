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

from sslscale.cluster.candidates import Candidates, CandidateSearch
from sslscale.cluster.kernels import Farthest, Pass, Totals, accumulate, farthest
from sslscale.cluster.tree import Tree
from sslscale.features import sample_positions
from sslscale.features.distance import prepare
from sslscale.features.files import replacing
from sslscale.runtime.base import compute_threads

if TYPE_CHECKING:
    from sslscale.cluster.on_device import DeviceKernels  # it imports torch

SAMPLE_PER_CLUSTER = 256  # rows a cluster that initial centroids are chosen from, as in faiss
FIRST_PER_CLUSTER = 48  # rows a cluster that the first iterations look at
MIN_SAMPLE = 16384
CHUNK_ROWS = 65536  # of an array, that one thread adds up at a time

RELAXATION = 1.6  # of early updates: how far past the mean, from where the centroid was
RELAXED_TOLERANCE = 0.001  # of the iterations over all rows that go past the means

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """How iterations go: over a share of the rows, each centroid `relaxation` of the way to its rows' mean.

    They end where going to the means lowers the objective by at most `tolerance` of itself, or by the run's own
    tolerance if that is more. Where they need not be `exact`, rows may go to a centroid that is about as near as the
    nearest (see tree.py).
    """

    share: float
    relaxation: float
    tolerance: float
    exact: bool


PLAIN = Step(1.0, 1.0, 0.0, exact=True)


def schedule(method: str, num_rows: int, num_clusters: int) -> list[Step]:
    """The steps of "lloyd" (plain from the first iteration) or of "minibatch".

    "minibatch" begins on a random sample that grows fourfold once it has taught what it can (nested mini-batches:
    Newling and Fleuret, 2016, https://arxiv.org/abs/1602.02934), and over-relaxes: a centroid c goes past the mean m of
    its rows, to c + RELAXATION (m - c). What its rows are apart, sum |x - c|^2 = sum |x - m|^2 + n |c - m|^2, falls for
    every factor below 2, and boundaries between clusters move on instead of creeping. It ends with plain, exact
    iterations over all rows. Few rows have those only.
    """
    if method == "lloyd":
        return [PLAIN]
    shares = [1.0]
    while shares[0] / 4 * num_rows >= max(FIRST_PER_CLUSTER * num_clusters, MIN_SAMPLE):
        shares.insert(0, shares[0] / 4)
    # The K means of a sample of n rows differ by chance from those of all rows, by K / n of the objective: a fall by
    # less is not worth another pass over the sample.
    samples = [Step(share, RELAXATION, num_clusters / (share * num_rows), exact=False) for share in shares[:-1]]
    return [*samples, Step(1.0, RELAXATION, RELAXED_TOLERANCE, exact=False), PLAIN] if samples else [PLAIN]


class Rows(Protocol):
    """N rows, seen only through sums, few of them, and one bounded sample."""

    num_rows: int

    def totals(self, wanted: Pass) -> Totals:
        """Of the rows that each restart looks at."""
        ...

    def farthest(self, wanted: Pass, count: int) -> Farthest:
        """The `count` rows farthest from their centroid, for the one restart of `wanted`."""
        ...

    def drawn(self, candidates: Candidates, count: int) -> Farthest:
        """`count` rows, more often those far from the candidates; see CandidateSearch.draw."""
        ...

    def weighed(self, candidates: Candidates) -> np.ndarray:
        """The weight of the rows nearest to each candidate: float64 (C,)."""
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
        self._search = CandidateSearch()

    def totals(self, wanted: Pass) -> Totals:
        def add_up(rows: np.ndarray, weights: np.ndarray | None, at: int) -> Totals:
            if self.on_device is not None:
                return self.on_device.accumulate(rows, self.metric, wanted, weights, at, name=at)
            return accumulate(rows, self.metric, wanted, weights, at)

        total = Totals.zero(wanted.centroids)
        for chunk in self._chunks(add_up):
            total.add(chunk)
        return total

    def farthest(self, wanted: Pass, count: int) -> Farthest:
        return Farthest.merge(
            self._chunks(lambda rows, weights, at: farthest(rows, self.metric, wanted, count, weights, at)), count
        )

    def drawn(self, candidates: Candidates, count: int) -> Farthest:
        draw = self._search.draw
        return Farthest.merge(
            self._chunks(lambda rows, weights, at: draw(rows, self.metric, candidates, count, weights, at, at)), count
        )

    def weighed(self, candidates: Candidates) -> np.ndarray:
        weigh = self._search.weigh
        return np.sum(
            list(self._chunks(lambda rows, weights, at: weigh(rows, self.metric, candidates, weights, at, at))), axis=0
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
    objective: np.ndarray  # (R,) float64, at the last pass; inf before the first over these rows
    active: np.ndarray  # (R,) bool
    iterations: np.ndarray  # (R,) int64, updates made so far
    steps: np.ndarray  # (R,) int64, where each is in the schedule
    measured: np.ndarray  # (R,) float64, the objective at its last pass, estimated from the rows that it looked at
    shares: np.ndarray  # (R,) float64, the share of the rows that this was
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
        before = {"measured": arrays["objective"].copy(), "shares": np.ones(len(arrays["objective"]))}  # as it was
        return cls(**{**before, **arrays, "passes": int(arrays["passes"])})

    @classmethod
    def start(cls, centroids: np.ndarray) -> LloydState:
        """Before the first pass, at centroids (R, K, D)."""
        zeros, unknown = np.zeros(len(centroids), dtype=np.int64), np.full(len(centroids), np.inf)
        return cls(centroids, unknown, zeros == 0, zeros, zeros.copy(), unknown.copy(), np.zeros(len(centroids)))


def lloyd(
    rows: Rows,
    state: LloydState,
    *,
    metric: str,
    max_iterations: int,
    tolerance: float,
    steps: Sequence[Step] = (PLAIN,),
    checkpoint: Callable[[LloydState], None] = lambda state: None,
) -> LloydState:
    """Iterates until every restart has converged in the last step, or has made `max_iterations` updates.

    A restart has converged when its objective falls by at most `tolerance` times itself and no cluster is empty that
    a row could fill. An earlier step ends when the update to come would lower the objective by as little, by the step's
    own tolerance, or when only as many updates are left as there are steps to come; every restart ends with a pass of
    the last step, so that objectives compare. `checkpoint(state)` is called after every pass; going on from a saved
    state gives the same bits.
    """
    last = len(steps) - 1
    while state.active.any():
        running = np.flatnonzero(state.active).tolist()
        for restart in running:
            updates = max_iterations - state.iterations[restart]
            _go_to(state, restart, min(last, last + 1 - updates), steps)
        now_at, centroids = [steps[step] for step in state.steps[running]], state.centroids[running]
        trees = [None if step.exact else Tree.over(own) for step, own in zip(now_at, centroids, strict=True)]
        wanted = Pass(centroids, np.array([step.share for step in now_at]), trees)
        totals = rows.totals(wanted)
        objective = totals.objective(wanted.centroids) / wanted.shares
        for at, restart in enumerate(running):
            before, now = state.objective[restart], objective[at]
            step = state.steps[restart]
            at_last = step == last
            state.objective[restart] = state.measured[restart] = now
            state.shares[restart] = wanted.shares[at]
            spent = state.iterations[restart] >= max_iterations
            filled = not spent and _refill_empty(rows, totals, at, wanted)
            if at_last:
                fell = now > 0 if np.isinf(before) else before - now > tolerance * before
                going_on = not spent and (filled or fell)
            else:
                falls = _fall(totals, at, wanted.centroids[at], metric)
                going_on = falls > max(tolerance, steps[step].tolerance)
            state.active[restart] = going_on or not at_last
            if not going_on and not at_last:
                _go_to(state, restart, step + 1, steps)
            if state.active[restart] and not spent:
                own = wanted.centroids[at]
                # The first centroids are rows, far from any mean.
                relaxation = steps[step].relaxation if state.iterations[restart] else 1.0
                state.centroids[restart] = update(totals.sums[at], totals.counts[at], own, metric, relaxation)
                state.iterations[restart] += 1
        state.passes += 1
        checkpoint(state)
    return state


def _go_to(state: LloydState, restart: int, following: int, steps: Sequence[Step]) -> None:
    """Takes a restart to a later step; it stays at one that is no earlier."""
    step = int(state.steps[restart])
    if following > step:
        if steps[following].share != steps[step].share:
            state.objective[restart] = np.inf  # it was that of other rows
        state.steps[restart] = following


def update(sums: np.ndarray, counts: np.ndarray, before: np.ndarray, metric: str, relaxation: float) -> np.ndarray:
    """The means (K, D) of the clusters, or past them; normalised under "cosine". One without any stays where it was."""
    scale = np.linalg.norm(sums, axis=1) if metric == "cosine" else counts
    means = np.where(scale[:, None] > 0, sums / np.where(scale > 0, scale, 1)[:, None], before)
    if relaxation != 1:
        means = before + relaxation * (means - before)
        if metric == "cosine":
            means = prepare(means, metric)
    return means.astype(before.dtype)


def _fall(totals: Totals, at: int, centroids: np.ndarray, metric: str) -> float:
    """By which share of itself the objective falls if the centroids (K, D) go to the means, and no row changes."""
    own = Totals(totals.sums[[at]], totals.counts[[at]], totals.squares[[at]])
    now = own.objective(centroids[None])[0]
    means = update(totals.sums[at], totals.counts[at], centroids, metric, 1.0)
    return 1 - own.objective(means[None])[0] / now if now > 0 else 0.0


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
    if share < 1:  # far rows of a smaller sample will do
        share = min(share, MIN_SAMPLE / rows.num_rows)
    found = rows.farthest(Pass.of(wanted.centroids[at : at + 1], share), len(empty))
    filled = 0
    for squared, donor, row, weight in zip(found.squared, found.labels, found.rows, found.weights, strict=True):
        if squared > 0 and 0 < weight < counts[donor]:
            cluster, value = empty[filled], weight * row.astype(np.float64)
            sums[donor] -= value
            counts[donor] -= weight
            sums[cluster], counts[cluster] = value, weight
            wanted.centroids[at, cluster] = row  # where it is now: an update does not go past it
            filled += 1
    return filled > 0
