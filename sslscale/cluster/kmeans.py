"""K-means: an estimator on arrays, and the workers that run the same code over the parts of a feature store."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from sslscale.cluster import hierarchy
from sslscale.cluster.candidates import Candidates, CandidateSearch
from sslscale.cluster.kernels import (
    Farthest,
    NearestCentroid,
    Pass,
    Totals,
    accumulate,
    add_rows,
    blocks,
    farthest,
    nested_sample,
    squared_distances,
)
from sslscale.cluster.lloyd import ArrayRows, lloyd, schedule
from sslscale.cluster.ranges import Range, add_range, by_range, find_labels, ranges, sorted_rows
from sslscale.cluster.seeding import initial_state
from sslscale.cluster.tree import Tree, by_group
from sslscale.errors import UserError
from sslscale.features import FeatureSet, sample_positions
from sslscale.features.distance import prepare, to_distance, to_objective
from sslscale.features.files import open_npy, write_npy
from sslscale.rundir import discard
from sslscale.runtime.base import Pool

if TYPE_CHECKING:
    from sslscale.cluster.on_device import DeviceKernels  # it imports torch

INITS = ("auto", "k-means++", "kmeans||", "random")
METRICS = ("l2", "cosine")
METHODS = ("lloyd", "minibatch", "hierarchical")
# Folders of what goes to which centroid or parent. Below them is one for each pass: a name is written once, since who
# has brought a file from another machine does not ask for it again.
RANGES, BY_PARENT = "ranges", "hierarchy/rows"


class KMeans(ClusterMixin, BaseEstimator):
    """K-means with scikit-learn's manners.

    `metric` is "l2" or "cosine" (spherical k-means); `init` is "k-means++", "kmeans||", "random", "auto" (k-means++, or
    kmeans|| for a thousand clusters and more) or an array (K, D); the lowest objective of `num_init` restarts wins.
    `method` is "lloyd", exact from the first iteration, or "minibatch", whose early iterations, if rows are many, see
    growing samples, go past the means and compare with centroids nearby only (see `lloyd.schedule`); both end with
    exact, plain passes over all rows. "hierarchical", for very many clusters, splits the rows of sqrt(K) parents and
    compares a row with a small part of the clusters (see hierarchy.py); it takes neither weights nor an array as init.
    Iterations end when the objective falls by at most `tolerance` of itself. Above 65536 rows `threads` share the work;
    how many does not change the result. `device` is "cpu", "cuda" or "auto": a GPU where there is one.

    Fitted: `cluster_centers_` (K, D), `labels_` int32 (N,), `n_iter_` (updates of the winner, or of its parents), and
    `inertia_`, the objective: the sum of squared Euclidean distances, or of 1 - cosine, to the centroid, in float64.
    """

    def __init__(
        self,
        num_clusters: int = 8,
        *,
        metric: str = "l2",
        init: str | np.ndarray = "auto",
        method: str = "minibatch",
        num_init: int = 1,
        max_iterations: int = 100,
        tolerance: float = 1e-4,
        threads: int = 1,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.num_clusters = num_clusters
        self.metric = metric
        self.init = init
        self.method = method
        self.threads = threads
        self.device = device
        self.num_init = num_init
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.random_state = random_state

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KMeans:
        """Fits X (N, D), finite, computed in its own precision (at least fp32); `sample_weight` is (N,) or None.

        Raises UserError (a ValueError) for an unknown setting and for fewer rows than clusters.
        """
        X = validate_data(self, X, dtype=[np.float32, np.float64], accept_large_sparse=False)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        self._check_settings(len(X), weights)
        init = self.init if isinstance(self.init, str) else prepare(np.array(self.init, dtype=X.dtype), self.metric)
        on_device = _on_device(self.device)
        rows = ArrayRows(X, self.metric, weights, self.threads, on_device)
        seed = int(check_random_state(self.random_state).randint(2**31))
        self._tree: Tree | None = None
        if self.method == "hierarchical":
            assert isinstance(init, str)
            self.cluster_centers_, self._tree, self.n_iter_ = hierarchy.fit_array(
                rows, self.num_clusters, init, self.num_init, self.max_iterations, self.tolerance, seed
            )
        else:
            state = lloyd(
                rows,
                initial_state(rows, self.num_clusters, init, self.num_init, seed),
                metric=self.metric,
                max_iterations=self.max_iterations,
                tolerance=self.tolerance,
                steps=schedule(self.method, len(X), self.num_clusters),
            )
            self.cluster_centers_, self.n_iter_ = state.centroids[state.best], int(state.iterations[state.best])
        self.labels_, squared = _assign(X, self.metric, self.cluster_centers_, on_device, tree=self._tree)
        self.inertia_ = to_objective(squared.sum() if weights is None else weights @ squared, self.metric)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The nearest centroid of each row of X (N, D), or about, if "hierarchical": int32 (N,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        return _assign(X, self.metric, self.cluster_centers_, _on_device(self.device), tree=self._tree)[0]

    def _check_settings(self, num_rows: int, weights: np.ndarray | None) -> None:
        if self.metric not in METRICS:
            raise UserError("unknown metric", got=self.metric, allowed=", ".join(METRICS))
        if self.method not in METHODS:
            raise UserError("unknown method", got=self.method, allowed=", ".join(METHODS))
        if isinstance(self.init, str) and self.init not in INITS:
            raise UserError("unknown init", got=self.init, allowed=f"{', '.join(INITS)} or an array (K, D)")
        expected = (self.num_clusters, self.n_features_in_)
        if not isinstance(self.init, str) and np.shape(self.init) != expected:
            raise UserError("init has another shape than the centroids", got=np.shape(self.init), allowed=expected)
        if self.method == "hierarchical" and (weights is not None or not isinstance(self.init, str)):
            raise UserError(
                "method='hierarchical' takes neither weights nor an array as init", fix="choose another method"
            )
        check_num_clusters(self.num_clusters, num_rows)


def check_num_clusters(num_clusters: int, num_rows: int) -> None:
    """Raises UserError unless there is a row for every cluster."""
    if not 1 <= num_clusters <= num_rows:
        raise UserError(
            "more clusters than samples" if num_clusters > num_rows else "num_clusters must be positive",
            got=f"num_clusters = {num_clusters}, n_samples = {num_rows}",
            allowed=f"1 to {num_rows}",
            fix="set a smaller number of clusters",
        )


def _on_device(name: str) -> DeviceKernels | None:
    """None for the CPU, whose kernels need no torch."""
    if name == "cpu":
        return None
    from sslscale.runtime.device import pick_device

    device = pick_device(name)
    if device.type == "cpu":
        return None
    from sslscale.cluster.on_device import DeviceKernels

    return DeviceKernels(device)


def _assign(
    rows: np.ndarray,
    metric: str,
    centroids: np.ndarray,
    on_device: DeviceKernels | None = None,
    name: Hashable = None,
    tree: Tree | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 (n,) and squared L2 distances float64 (n,) of rows (n, D), read in blocks; exact without a tree."""
    if on_device is not None and tree is None:
        return on_device.assign(rows, metric, centroids, name)
    labels = np.empty(len(rows), dtype=np.int32)
    squared = np.empty(len(rows))
    if tree is not None:
        for at, x, own in tree.assign(rows, metric, centroids):
            labels[at], squared[at] = own, squared_distances(x, centroids, own)
        return labels, squared
    nearest = NearestCentroid(centroids.astype(np.result_type(rows.dtype, np.float32), copy=False))
    for here, x in blocks(rows, metric):
        labels[here] = nearest(x)
        squared[here] = squared_distances(x, centroids, labels[here])
    return labels, squared


# ------------------------------------------------------------------ over a feature store


class KMeansWorker:
    """Reads parts of a feature set, memory-mapped, and answers with sums; rows leave it only for the initial sample.

    `features` is a set's `paths`; `output` is the stage's folder. On a GPU it adds up and assigns; the few rows that
    are looked for one by one, and the splits of the hierarchical method, are the processor's.
    """

    def __init__(self, features: Mapping[str, str], metric: str, output: str, device: str = "cpu") -> None:
        self.features, self.metric, self.output = FeatureSet.open(features), metric, Path(output)
        self.on_device = _on_device(device)
        self._search = CandidateSearch()

    def gather(self, item: tuple[int, np.ndarray], broadcast: None) -> np.ndarray:
        """Prepared rows of `(part, row numbers)`, (n, D)."""
        part, rows = item
        return prepare(self.features.block(part)[rows], self.metric)

    def totals(self, part: int, wanted: Pass) -> Totals:
        """Of the part's rows."""
        rows = self.features.block(part)
        if self.on_device is not None:
            return self.on_device.accumulate(rows, self.metric, wanted, seed=part, name=part)
        return accumulate(rows, self.metric, wanted, seed=part)

    def sort(self, item: tuple[int, int], broadcast: tuple[Pass, str]) -> float:
        """Writes which rows of `(part, restart)` go to which centroid, for `(pass, its name)`.

        Returns the sum of their ||x||^2.
        """
        (part, restart), (wanted, name) = item, broadcast
        rows = self.features.block(part)
        sample = nested_sample(len(rows), float(wanted.shares[restart]), part)
        if self.on_device is not None:
            labels, square = self.on_device.find_labels(rows, self.metric, wanted, restart, sample, part)
        else:
            labels, square = find_labels(rows, self.metric, wanted, restart, sample)
        folder = self._only(RANGES, name)
        write_npy(folder / f"sorted-{part:05d}-{restart}.npy", sorted_rows(labels, sample))
        return square

    def add_range(self, wanted: Range, name: str) -> Totals:
        """Of a range of centroids, over all parts, as `sort` has written them."""
        folder = self._only(RANGES, name)
        files = (folder / f"sorted-{part.number:05d}-{wanted.restart}.npy" for part in self.features.parts)
        parts = ((self.features.block(number), open_npy(file)) for number, file in enumerate(files))
        return add_range(parts, self.metric, wanted)

    def _only(self, kind: str, name: str) -> Path:
        """The folder of a pass; this machine's files of those before are deleted."""
        folder = self.output / kind / name
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)  # another worker may be at it
        return folder

    def farthest(self, part: int, broadcast: tuple[Pass, int]) -> Farthest:
        """The part's rows that are farthest from their centroid, for `(pass of one restart, how many)`."""
        wanted, count = broadcast
        return farthest(self.features.block(part), self.metric, wanted, count, seed=part)

    def drawn(self, part: int, broadcast: tuple[Candidates, int]) -> Farthest:
        """Rows of the part, more often those far from the candidates, for `(candidates, how many)`."""
        candidates, count = broadcast
        rows = self.features.block(part)
        return self._search.draw(rows, self.metric, candidates, count, seed=part, name=part)

    def weighed(self, part: int, candidates: Candidates) -> np.ndarray:
        """How many of the part's rows are nearest to each candidate."""
        return self._search.weigh(self.features.block(part), self.metric, candidates, seed=part, name=part)

    def partition(self, part: int, broadcast: tuple[np.ndarray, str]) -> np.ndarray:
        """Writes the part's row numbers sorted by parent, and where each parent's begin, for `(parents (P, D), name)`.

        Returns their sizes (P,).
        """
        parents, name = broadcast
        labels, _ = _assign(self.features.block(part), self.metric, parents, self.on_device, part)
        order, starts = by_group(labels, len(parents))
        folder = self._only(BY_PARENT, name)
        write_npy(folder / f"order-{part:05d}.npy", order)
        write_npy(folder / f"starts-{part:05d}.npy", starts)
        return np.diff(starts)

    def rows_of(self, parent: int, broadcast: tuple[str, int, int]) -> np.ndarray:
        """Prepared rows of a parent, (n, D), as `partition` has sorted them, for `(name, how many at most, seed)`."""
        name, limit, seed = broadcast
        folder, spans = self._only(BY_PARENT, name), []
        for part in self.features.parts:
            order, starts = (open_npy(folder / f"{of}-{part.number:05d}.npy") for of in ("order", "starts"))
            own = np.array(order[starts[parent] : starts[parent + 1]])  # a view would keep a file of each part open
            spans.append((part.number, own))
        return hierarchy.gather(self.features, spans, self.metric, limit, seed)

    def split(self, item: tuple[int, int], settings: tuple[str, str, int, float, int]) -> None:
        """Writes the centroids of `(parent, number of children)`, for `(name, init, max_iterations, tolerance, seed)`.

        `name` is that of `partition`.
        """
        parent, num_children = item
        name, init, max_iterations, tolerance, seed = settings
        x = self.rows_of(parent, (name, hierarchy.sample_limit(num_children), seed))
        children = hierarchy.split(x, num_children, self.metric, init, max_iterations, tolerance, seed)
        write_npy(self.output / "hierarchy" / f"children-{parent:06d}.npy", children)

    def given(self, part: int, broadcast: None) -> tuple[np.ndarray, np.ndarray]:
        """Sums (K, D) of the part's rows and their numbers (K,), by the cluster that the objective gives most to."""
        labels, num_clusters = self._given(part)
        sums, counts = np.zeros((num_clusters, self.features.dim)), np.zeros(num_clusters)
        for here, x in blocks(self.features.block(part), self.metric):
            add_rows(labels[here], x.astype(np.float64), np.ones(len(x)), sums, counts)
        return sums, counts.astype(np.int64)

    def assign_given(self, part: int, centroids: np.ndarray) -> dict[str, Any]:
        """`assign`, to the clusters that the objective gives; `centroids` (K, D) are their means."""
        labels, _ = self._given(part)
        squared = np.empty(len(labels))
        for here, x in blocks(self.features.block(part), self.metric):
            squared[here] = squared_distances(x, centroids, labels[here])
        return self._write(part, labels, squared)

    def _given(self, part: int) -> tuple[np.ndarray, int]:
        if not self.features.parts[part].rows:
            return np.zeros(0, dtype=np.int32), 0
        probs = self.features.column(part, "cluster_probs")
        return probs.argmax(axis=1).astype(np.int32), probs.shape[1]

    def assign(self, part: int, clusters: tuple[np.ndarray, Tree | None]) -> dict[str, Any]:
        """Writes the part's assignments and distances, exact or by a tree of the centroids (K, D).

        Returns how many rows it has and their objective.
        """
        centroids, tree = clusters
        rows = self.features.block(part)
        return self._write(part, *_assign(rows, self.metric, centroids, self.on_device, part, tree))

    def _write(self, part: int, labels: np.ndarray, squared: np.ndarray) -> dict[str, Any]:
        file = self.features.parts[part].file
        write_npy(self.output / "assignments" / file, labels)
        write_npy(self.output / "distances" / file, to_distance(squared, self.metric).astype(np.float32))
        return {"rows": len(labels), "objective": to_objective(squared.sum(), self.metric)}


_passes = itertools.count()  # of this process, and so of its workers


class PoolRows:
    """The rows of a feature set, held by a pool of KMeansWorker that writes below `output`.

    Results are reduced in the order of the parts.
    """

    def __init__(self, pool: Pool, features: FeatureSet, output: Path) -> None:
        self.pool, self.features, self.output = pool, features, output
        self.num_rows = features.num_rows
        self._parts = [part.number for part in features.parts]

    def totals(self, wanted: Pass) -> Totals:
        if by_range(wanted.centroids):
            return self._totals_by_range(wanted)
        total = Totals.zero(wanted.centroids)
        for part in self._in_order("totals", self._parts, wanted):
            total.add(part)
        return total

    def _totals_by_range(self, wanted: Pass) -> Totals:
        total = Totals.zero(wanted.centroids)
        name = str(next(_passes))
        items = [(part, restart) for part in self._parts for restart in range(len(wanted.centroids))]
        squares = self._in_order("sort", items, (wanted, name))
        for (_, restart), square in zip(items, squares, strict=True):
            total.squares[restart] += square
        split = ranges(wanted.centroids)
        for index, found in self.pool.map("add_range", split, name):
            here = split[index]
            total.sums[here.restart, here.start : here.stop] = found.sums[0]
            total.counts[here.restart, here.start : here.stop] = found.counts[0]
        discard(self.output / RANGES / name)
        return total

    def farthest(self, wanted: Pass, count: int) -> Farthest:
        return Farthest.merge(self._in_order("farthest", self._parts, (wanted, count)), count)

    def drawn(self, candidates: Candidates, count: int) -> Farthest:
        return Farthest.merge(self._in_order("drawn", self._parts, (candidates, count)), count)

    def weighed(self, candidates: Candidates) -> np.ndarray:
        return reduce(np.add, self._in_order("weighed", self._parts, candidates))

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.features.row_ids(sample_positions(self.num_rows, size, seed))
        items = [(int(part), ids[ids >> 32 == part] & 0xFFFFFFFF) for part in np.unique(ids >> 32)]
        rows = np.concatenate(list(self._in_order("gather", items)))
        return rows, np.ones(len(rows))

    def _in_order(self, method: str, items: Sequence[Any], broadcast: Any = None) -> Iterator[Any]:
        return (result for _, result in self.pool.map(method, items, broadcast, ordered=True))
