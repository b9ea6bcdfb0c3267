"""Where the iterations begin: centroids that are rows, spread out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.cluster import kmeans_plusplus

from sslscale.cluster.candidates import Candidates
from sslscale.cluster.lloyd import MIN_SAMPLE, SAMPLE_PER_CLUSTER, LloydState, Rows

ROUNDS = 5  # of k-means||, each of which draws as many candidates as there are clusters
ROWS_PER_CLUSTER = 32  # that k-means|| and random look at
MANY_CLUSTERS = 1000  # from which on kmeans|| is as good and several times as fast
MOST_CHOICES = 4096  # one after the other, when candidates are reduced
MATRIX_BYTES = 2**29  # of the distances between all candidates, if they are kept


def initial_state(rows: Rows, num_clusters: int, init: str | np.ndarray, num_init: int, seed: int) -> LloydState:
    """Initial centroids: an array (K, D) as given, or rows chosen by "random", "k-means++", "kmeans||" or "auto".

    k-means++ is scikit-learn's greedy variant (Arthur and Vassilvitskii, 2007), on a bounded sample in this process.
    """
    if isinstance(init, np.ndarray):
        return LloydState.start(init[None])
    if init == "auto":
        init = "kmeans||" if num_clusters >= MANY_CLUSTERS else "k-means++"
    seeds = [int(restart) for restart in np.random.SeedSequence(seed).generate_state(num_init)]
    if init == "kmeans||":
        return LloydState.start(np.stack([_kmeans_parallel(rows, num_clusters, restart) for restart in seeds]))
    choose, per_cluster = (_plusplus, SAMPLE_PER_CLUSTER) if init == "k-means++" else (_random, ROWS_PER_CLUSTER)
    sample, weights = rows.sample(max(per_cluster * num_clusters, MIN_SAMPLE), seed)
    return LloydState.start(np.stack([choose(sample, weights, num_clusters, restart) for restart in seeds]))


def _plusplus(sample: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    return kmeans_plusplus(sample, num_clusters, sample_weight=weights, random_state=seed)[0]


def _random(sample: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    share = weights / weights.sum()
    return sample[np.random.default_rng(seed).choice(len(sample), num_clusters, replace=False, p=share)]


def _kmeans_parallel(rows: Rows, num_clusters: int, seed: int) -> np.ndarray:
    """k-means|| (Bahmani et al., 2012, https://arxiv.org/abs/1203.6402): (K, D).

    A few rounds draw many rows each, in proportion to their squared distance to those drawn before; the candidates,
    weighted by the rows nearest to them, are then reduced to K by k-means++. Exactly K rows a round are drawn, by one
    pass each, where the paper draws each row by itself.
    """
    share = min(1.0, max(ROWS_PER_CLUSTER * num_clusters, MIN_SAMPLE) / rows.num_rows)
    candidates = Candidates((rows.sample(1, seed)[0],), share, seed, num_clusters)
    for _ in range(ROUNDS):
        drawn = rows.drawn(candidates, num_clusters)
        new = drawn.rows[drawn.squared > 0]
        if not len(new):
            break
        candidates = replace(candidates, rounds=(*candidates.rounds, new))
    found = candidates.joined()
    if len(found) < num_clusters:  # fewer distinct rows than clusters
        sample, weights = rows.sample(max(SAMPLE_PER_CLUSTER * num_clusters, MIN_SAMPLE), seed)
        return _plusplus(sample, weights, num_clusters, seed)
    return _reduce(found, rows.weighed(candidates), num_clusters, seed)


def _reduce(x: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """K of the candidates x (C, D), of such weights (C,), by greedy k-means++: of several that are drawn, the best.

    A draw is in proportion to w ||x - c||^2 to the nearest chosen c; the best is the one that leaves the least of that.
    Between few candidates all distances are computed at once: four times the usual 2 + log K draws then cost little,
    and make up for the rows that are no candidates. Of very many clusters some are chosen at once, as they are drawn:
    each choice reads all candidates.
    """
    generator = np.random.default_rng(seed)
    centred = x - np.average(x, axis=0, weights=weights).astype(x.dtype)
    norms = np.einsum("cd,cd->c", centred, centred)
    at_once = max(1, num_clusters // MOST_CHOICES)
    trials = 4 * (2 + int(np.log(num_clusters))) if at_once == 1 else at_once

    def squared(at: np.ndarray | slice) -> np.ndarray:
        found = centred[at] @ centred.T
        found *= -2
        found += norms
        found += norms[at, None]
        return np.maximum(found, 0, out=found)

    every = squared(slice(None)) if norms.itemsize * len(x) ** 2 <= MATRIX_BYTES else None
    weights32, left = weights.astype(x.dtype), np.empty((trials, len(x)), x.dtype)
    chosen = [int(generator.choice(len(x), p=weights / weights.sum()))]
    nearest = squared(np.array(chosen))[0]
    while len(chosen) < num_clusters:
        nearest[chosen[-at_once:]] = 0
        reach = np.cumsum(weights * nearest)
        drawn = np.searchsorted(reach, generator.random(trials) * reach[-1], side="right")
        drawn = np.minimum(drawn, len(x) - 1)
        if every is None:
            left[:] = squared(drawn)
        else:
            np.take(every, drawn, axis=0, out=left, mode="clip")  # "raise" would buffer
        np.minimum(left, nearest, out=left)
        if at_once > 1:
            chosen.extend(np.unique(drawn).tolist()[: num_clusters - len(chosen)])
            nearest = left.min(axis=0)
            continue
        best = int(np.argmin(left @ weights32))
        chosen.append(int(drawn[best]))
        nearest = left[best].copy()
    return x[chosen]
