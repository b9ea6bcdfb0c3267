"""The least effort that finds enough: nprobe, efSearch and k_factor, raised until a sample's recall is the wanted one.

What costs less is decided by what a search has to touch, not by a clock, so that the same index is always tuned alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sslscale.index.factory import Effort

STEP = 2**0.25  # between two values that are tried, once their range is known
FLAT_GAIN = 0.005  # of recall: an effort doubled twice that gains less has reached what its codes can tell
CANDIDATE_BYTES = 2048  # what fetching one candidate of a refining index costs, in bytes of codes scanned in order
MAX_K_FACTOR = 64

Recall = Callable[[Effort], float]


@dataclass(frozen=True)
class Tuned:
    """An effort, the recall that was measured with it, and what it touches."""

    effort: Effort
    recall: float
    cost: float


def tune(recall: Recall, start: Effort, limits: Effort, wanted: float, bytes_per_list: float) -> Tuned:
    """The cheapest effort whose recall is at least `wanted`, or the one that comes nearest to it.

    `start` holds the first values, None for a parameter that the index does not have; a parameter whose value in
    `limits` is the same stays as it is. `bytes_per_list` is the mean size of an inverted list's codes.
    """

    def measured(effort: Effort) -> Tuned:
        cost = (effort.nprobe or 0) * bytes_per_list + 10 * CANDIDATE_BYTES * (effort.k_factor or 0)
        return Tuned(effort, recall(effort), cost + (effort.ef_search or 0))

    if start.k_factor is None:
        return _least(measured, start, limits, wanted, cheaper_than=float("inf"))
    best: Tuned | None = None
    factor = start.k_factor
    while factor <= MAX_K_FACTOR:
        bound = best.cost if best is not None and best.recall >= wanted else float("inf")
        if 10 * CANDIDATE_BYTES * factor >= bound:
            break
        found = _least(measured, replace(start, k_factor=factor), limits, wanted, bound)
        if best is None or _better(found, best, wanted):
            best = found
        factor *= 2
    assert best is not None
    return best


def _better(one: Tuned, other: Tuned, wanted: float) -> bool:
    if one.recall >= wanted and other.recall >= wanted:
        return one.cost < other.cost
    return one.recall > other.recall


def _least(
    measured: Callable[[Effort], Tuned], start: Effort, limits: Effort, wanted: float, cheaper_than: float
) -> Tuned:
    """The least nprobe or efSearch: doubled until enough is found or nothing more is, then narrowed down."""
    name = "nprobe" if start.nprobe is not None else "ef_search"
    low, limit = getattr(start, name), getattr(limits, name)
    history = [measured(start)]
    while low is not None and low < limit and history[-1].recall < wanted and history[-1].cost < cheaper_than:
        if len(history) > 2 and history[-1].recall - history[-3].recall < FLAT_GAIN:
            return history[-1]
        low = min(2 * low, limit)
        history.append(measured(replace(start, **{name: low})))
    best = history[-1]
    if best.recall < wanted or len(history) == 1:
        return best
    for value in _between(getattr(history[-2].effort, name), low):
        tried = measured(replace(start, **{name: value}))
        if tried.recall >= wanted:
            return tried
    return best


def _between(low: int, high: int) -> list[int]:
    values = [round(low * STEP**step) for step in range(1, 4)]
    return sorted({value for value in values if low < value < high})
