"""Choosing the number of clusters without labels: the same fit for each, and what the fits say about themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from sslscale.cluster.kernels import nearest_centroid, squared_distances
from sslscale.cluster.kmeans import KMeans
from sslscale.cluster.measures import Tally, davies_bouldin, silhouette
from sslscale.config import ClusterConfig

STABLE_WITHIN = 0.05  # of the best stability: so much it varies from sample to sample


def describe(
    sample: np.ndarray, centroids: np.ndarray, best: int, objective: float, settings: ClusterConfig, seed: int
) -> dict[str, Any]:
    """One line of the sweep, from prepared rows (n, D), a sample, and the centroids (R, K, D) of the restarts.

    `stability_seeds` is the mean ARI between the assignments of any two restarts, None for a single one;
    `stability_halves` that between two fits, each on one half of the sample, over the whole sample (Ben-Hur et al.,
    2002). Silhouette and Davies-Bouldin are of the best restart, over the sample.
    """
    labels = [nearest_centroid(sample, own) for own in centroids]
    tally = Tally(centroids.shape[1])
    tally.add(labels[best], np.sqrt(squared_distances(sample, centroids[best], labels[best])), None)
    return {
        "num_clusters": centroids.shape[1],
        "objective": objective,
        "silhouette": silhouette(sample, labels[best], settings.metric),
        "davies_bouldin": davies_bouldin(centroids[best], tally),
        "stability_seeds": _mean_ari(labels),
        "stability_halves": _mean_ari(_halves(sample, centroids.shape[1], settings, seed)),
    }


def _halves(sample: np.ndarray, num_clusters: int, settings: ClusterConfig, seed: int) -> list[np.ndarray]:
    """The assignments of the sample by a fit on each of its halves; none where a half has too few rows."""
    order = np.random.default_rng(seed).permutation(len(sample))
    halves = np.array_split(order, 2)
    if len(halves[1]) < num_clusters:
        return []
    model = KMeans(
        num_clusters,
        metric=settings.metric,
        init=settings.init,
        num_init=settings.num_init,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
        random_state=seed,
    )
    return [model.fit(sample[half]).predict(sample) for half in halves]


def _mean_ari(labels: Sequence[np.ndarray]) -> float | None:
    pairs = [adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]
    return float(np.mean(pairs)) if pairs else None


def choose(lines: Sequence[dict[str, Any]]) -> int:
    """The number of clusters of the highest silhouette among those nearly as stable as the most stable.

    The stability of a line is the mean of what it has of the two; nearly is within STABLE_WITHIN. The smaller number
    wins a tie.
    """
    stability = [_stability(line) for line in lines]
    stable = [line for line, own in zip(lines, stability, strict=True) if own >= max(stability) - STABLE_WITHIN]
    return max(stable, key=lambda line: (_silhouette(line), -line["num_clusters"]))["num_clusters"]


def _silhouette(line: dict[str, Any]) -> float:
    return -1.0 if line["silhouette"] is None else line["silhouette"]


def _stability(line: dict[str, Any]) -> float:
    known = [line[key] for key in ("stability_seeds", "stability_halves") if line[key] is not None]
    return float(np.mean(known)) if known else 0.0
