"""The rows that k-means|| draws round by round, and what those who hold the rows remember between two rounds.

A round's candidates are compared with every row once, by whoever holds it: the nearest of those before is remembered.
Where it is not (another worker has the part now), the rounds are gone through again, with the same bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sslscale.cluster.kernels import Farthest, nested_sample, squared_distances
from sslscale.cluster.tree import Tree, nearly_nearest
from sslscale.features.distance import prepare


@dataclass(frozen=True)
class Candidates:
    """Rows that may become centroids, (c, D) a round; `share` of the rows is looked at.

    `seed` is the restart's, and with `num_clusters` names it: other numbers of clusters are tried with the same seeds.
    """

    rounds: tuple[np.ndarray, ...]
    share: float
    seed: int
    num_clusters: int

    def joined(self) -> np.ndarray:
        return np.concatenate(self.rounds)


@dataclass
class _Nearest:
    """Of one part's sampled rows: the nearest candidate of the first `rounds` rounds, and how far it is."""

    rounds: int
    labels: np.ndarray  # (n,) int32
    squared: np.ndarray  # (n,) float64


class CandidateSearch:
    """Finds the nearest candidate of the rows of parts. `name` is the part's, `seed` draws its sample."""

    def __init__(self) -> None:
        self._restart: tuple[int, int] | None = None  # whose distances are remembered
        self._known: dict[Hashable, _Nearest] = {}
        self._trees: dict[int, Tree | None] = {}  # by round

    def draw(
        self,
        rows: np.ndarray,
        metric: str,
        candidates: Candidates,
        count: int,
        weights: np.ndarray | None = None,
        seed: int | Sequence[int] = 0,
        name: Hashable = None,
    ) -> Farthest:
        """`count` of rows (n, D), without replacement, in proportion to w ||x - c||^2 to the nearest candidate c.

        They are the highest of w ||x - c||^2 / Exp(1) (Efraimidis and Spirakis, 2006,
        https://doi.org/10.1016/j.ipl.2005.11.003), so that the highest of several parts' are a draw from all of them.
        """
        sample, w, nearest = self._look(rows, metric, candidates, weights, seed, name)
        generator = np.random.default_rng([candidates.seed, len(candidates.rounds), *np.atleast_1d(seed)])
        keys = w * nearest.squared / generator.standard_exponential(len(w))
        top = np.argsort(-keys, kind="stable")[:count]
        at = top if isinstance(sample, slice) else sample[top]
        return Farthest(keys[top], nearest.squared[top], nearest.labels[top], prepare(rows[at], metric), w[top])

    def weigh(
        self,
        rows: np.ndarray,
        metric: str,
        candidates: Candidates,
        weights: np.ndarray | None = None,
        seed: int | Sequence[int] = 0,
        name: Hashable = None,
    ) -> np.ndarray:
        """The sum of the weights of the rows that are nearest to each candidate: float64 (C,)."""
        _, w, nearest = self._look(rows, metric, candidates, weights, seed, name)
        return np.bincount(nearest.labels, weights=w, minlength=sum(map(len, candidates.rounds)))

    def _look(
        self,
        rows: np.ndarray,
        metric: str,
        candidates: Candidates,
        weights: np.ndarray | None,
        seed: int | Sequence[int],
        name: Hashable,
    ) -> tuple[np.ndarray | slice, np.ndarray, _Nearest]:
        """The rows looked at, their weights and their nearest candidates, or about; ties go to the earliest."""
        restart = (candidates.seed, candidates.num_clusters)
        if restart != self._restart:
            self._known, self._trees, self._restart = {}, {}, restart
        sample = nested_sample(len(rows), candidates.share, seed)
        size = len(rows) if isinstance(sample, slice) else len(sample)
        nearest = self._known.get(name) if name is not None else None
        if nearest is None:
            nearest = _Nearest(0, np.zeros(size, dtype=np.int32), np.full(size, np.inf))
        first = sum(map(len, candidates.rounds[: nearest.rounds]))
        for number, own in enumerate(candidates.rounds[nearest.rounds :], nearest.rounds):
            if number not in self._trees:
                self._trees[number] = Tree.over(own)
            for at, x, labels in nearly_nearest(rows, metric, own, self._trees[number], sample):
                squared = squared_distances(x, own, labels)
                closer = squared < nearest.squared[at]
                nearest.labels[at] = np.where(closer, labels + first, nearest.labels[at])
                nearest.squared[at] = np.where(closer, squared, nearest.squared[at])
            first += len(own)
        nearest.rounds = len(candidates.rounds)
        self._known[name] = nearest
        return sample, np.ones(size) if weights is None else weights[sample], nearest
