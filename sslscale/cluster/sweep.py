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
from sslscale.features import sample_positions

STABLE_WITHIN = 0.05  # of the best stability: so much it varies from sample to sample
PER_CLUSTER = 50  # rows that a half of the sample has for each of the most clusters, if MOST_SAMPLED allows it
LEAST_PER_CLUSTER = 5  # rows; on fewer, two fits agree or not by chance
MOST_SAMPLED = 2**16  # rows: a fit on each half, in one process, takes minutes for thousands of clusters
MOST_COMPARED = 2**14  # rows of which all pairs are compared for the silhouette, which takes seconds
STABILITIES = ("stability_seeds", "stability_halves")


def sample_size(settings: ClusterConfig) -> int:
    """Rows of the sample that all numbers of clusters are described by: enough for the halves of the largest."""
    numbers = settings.num_clusters if isinstance(settings.num_clusters, list) else [settings.num_clusters]
    return max(settings.silhouette_samples, min(2 * PER_CLUSTER * max(numbers), MOST_SAMPLED))


def describe(
    sample: np.ndarray, centroids: np.ndarray, best: int, objective: float, settings: ClusterConfig, seed: int
) -> dict[str, Any]:
    """One line of the sweep, from prepared rows (n, D), a sample, and the centroids (R, K, D) of the restarts.

    `stability_seeds` is the mean ARI between the assignments of any two restarts, None for a single one;
    `stability_halves` that between two fits, each on one half of the sample, over the whole sample (Ben-Hur et al.,
    2002), None where a half has less than LEAST_PER_CLUSTER rows a cluster. Silhouette and Davies-Bouldin are of the
    best restart, over the sample; the silhouette over MOST_COMPARED rows of it, or `silhouette_samples` if more.
    """
    labels = [nearest_centroid(sample, own) for own in centroids]
    tally = Tally(centroids.shape[1])
    tally.add(labels[best], np.sqrt(squared_distances(sample, centroids[best], labels[best])), None)
    at = sample_positions(len(sample), max(settings.silhouette_samples, MOST_COMPARED), seed)
    return {
        "num_clusters": centroids.shape[1],
        "objective": objective,
        "silhouette": silhouette(sample[at], labels[best][at], settings.metric),
        "davies_bouldin": davies_bouldin(centroids[best], tally),
        "stability_seeds": _mean_ari(labels),
        "stability_halves": _mean_ari(_halves(sample, centroids.shape[1], settings, seed)),
    }


def _halves(sample: np.ndarray, num_clusters: int, settings: ClusterConfig, seed: int) -> list[np.ndarray]:
    """The assignments of the sample by a fit on each of its halves; none where a half has too few rows."""
    order = np.random.default_rng(seed).permutation(len(sample))
    halves = np.array_split(order, 2)
    if len(halves[1]) < LEAST_PER_CLUSTER * num_clusters:
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

    Like is compared with like: the stability of a line is the mean of those of the two that every line has, and where
    they have none in common, the silhouette alone decides. A line without a silhouette, as that of one cluster, which
    is stable whatever the rows are, is not compared with those that have one. Nearly is within STABLE_WITHIN. The
    smaller number wins a tie.
    """
    lines = [line for line in lines if line["silhouette"] is not None] or lines
    known = [key for key in STABILITIES if all(line[key] is not None for line in lines)]
    stability = [sum(line[key] for key in known) / max(len(known), 1) for line in lines]
    stable = [line for line, own in zip(lines, stability, strict=True) if own >= max(stability) - STABLE_WITHIN]
    return max(stable, key=lambda line: (line["silhouette"] or 0.0, -line["num_clusters"]))["num_clusters"]
