"""Where the iterations begin: centroids that are rows, spread out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.cluster import kmeans_plusplus

from sslscale.cluster.candidates import Candidates
from sslscale.cluster.lloyd import MIN_SAMPLE, SAMPLE_PER_CLUSTER, LloydState, Rows

ROUNDS = 5  # of k-means||, each of which draws half as many candidates as there are clusters
ROWS_PER_CLUSTER = 32  # that k-means|| looks at


def initial_state(rows: Rows, num_clusters: int, init: str | np.ndarray, num_init: int, seed: int) -> LloydState:
    """Initial centroids: an array (K, D) as given, or rows chosen by "random", "k-means++" or "kmeans||".

    k-means++ is scikit-learn's greedy variant (Arthur and Vassilvitskii, 2007), on a bounded sample in this process.
    """
    if isinstance(init, np.ndarray):
        return LloydState.start(init[None])
    seeds = [int(restart) for restart in np.random.SeedSequence(seed).generate_state(num_init)]
    if init == "kmeans||":
        return LloydState.start(np.stack([_kmeans_parallel(rows, num_clusters, restart) for restart in seeds]))
    sample, weights = rows.sample(max(SAMPLE_PER_CLUSTER * num_clusters, MIN_SAMPLE), seed)
    choose = _plusplus if init == "k-means++" else _random
    return LloydState.start(np.stack([choose(sample, weights, num_clusters, restart) for restart in seeds]))


def _plusplus(sample: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    return kmeans_plusplus(sample, num_clusters, sample_weight=weights, random_state=seed)[0]


def _random(sample: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    share = weights / weights.sum()
    return sample[np.random.default_rng(seed).choice(len(sample), num_clusters, replace=False, p=share)]


def _kmeans_parallel(rows: Rows, num_clusters: int, seed: int) -> np.ndarray:
    """k-means|| (Bahmani et al., 2012, https://arxiv.org/abs/1203.6402): (K, D).

    A few rounds draw many rows each, in proportion to their squared distance to those drawn before; the candidates,
    weighted by the rows nearest to them, are then reduced to K by k-means++. Exactly K / 2 rows a round are drawn, by
    one pass each, where the paper draws each row by itself.
    """
    share = min(1.0, max(ROWS_PER_CLUSTER * num_clusters, MIN_SAMPLE) / rows.num_rows)
    candidates = Candidates((rows.sample(1, seed)[0],), share, seed)
    for _ in range(ROUNDS):
        drawn = rows.drawn(candidates, -(-num_clusters // 2))
        new = drawn.rows[drawn.squared > 0]
        if not len(new):
            break
        candidates = replace(candidates, rounds=(*candidates.rounds, new))
    found = candidates.joined()
    if len(found) < num_clusters:  # fewer distinct rows than clusters
        sample, weights = rows.sample(max(SAMPLE_PER_CLUSTER * num_clusters, MIN_SAMPLE), seed)
        return _plusplus(sample, weights, num_clusters, seed)
    return _plusplus(found, rows.weighed(candidates), num_clusters, seed)
