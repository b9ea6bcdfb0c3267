"""Which samples are duplicates of which: pairs with equal bytes, pairs that are near, and the groups that they make."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sslscale.features import FeatureSet
from sslscale.index.all_pairs import Neighbours

# Shares of the distance to the k-th neighbour. A copy is far nearer than what else lies around a sample.
CANDIDATE_SHARE = 0.3
OUTSTANDING_SHARE = 0.1
FLOOR_SHARE = 0.01  # of the median of these distances, for samples whose k neighbours are all duplicates
CROWD_SHARE = 0.1  # of that median: so near a pair is compared even where it does not stand out, for the same samples


def content_hashes(features: FeatureSet) -> np.ndarray:
    """The first 16 bytes of each sample's content hash, (N,), comparable for equality."""
    parts = []
    for part in features.parts:
        column = features.stores[part.dataset].table(part.part, ["sha256"]).column("sha256").combine_chunks()
        digests = np.frombuffer(column.buffers()[1], np.uint8, count=32 * part.rows).reshape(-1, 32)
        parts.append(np.ascontiguousarray(digests[:, :16]).view("V16")[:, 0])
    return np.concatenate(parts)


def exact_pairs(hashes: np.ndarray) -> np.ndarray:
    """(n, 2) positions: each sample whose bytes an earlier one has, with the first that has them."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    originals = first[inverse]
    copies = np.flatnonzero(originals != np.arange(len(hashes)))
    return np.stack([originals[copies], copies], axis=1)


def near_pairs(neighbours: Neighbours, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) positions, the smaller first: pairs of the kNN graph that may be one picture; and which stand out, (n,).

    With a threshold those whose cosine similarity reaches it; else those that are much nearer than the neighbourhood.
    """
    features = neighbours.features
    median = float(np.median(np.concatenate([blocks[0][:, -1] for blocks in _blocks(neighbours)])))
    floor, crowd = FLOOR_SHARE * median, CROWD_SHARE * median
    pairs, outstanding, start = [], [], 0
    for distances, ids in _blocks(neighbours):
        around = distances[:, -1:]
        limit = np.maximum(CANDIDATE_SHARE * around, crowd) if threshold is None else 1 - threshold
        row, at = np.nonzero(distances <= limit)
        pairs.append(np.stack([start + row, features.positions(ids[row, at])], axis=1))
        outstanding.append((distances <= np.maximum(OUTSTANDING_SHARE * around, floor))[row, at])
        start += len(distances)
    both, where = np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0, return_inverse=True)
    stands_out = np.zeros(len(both), bool)
    np.logical_or.at(stands_out, where.ravel(), np.concatenate(outstanding))  # seen from either side
    return both, stands_out


def _blocks(neighbours: Neighbours) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return (neighbours.block(part.number) for part in neighbours.features.parts)


def groups_of(pairs: np.ndarray, num_samples: int) -> np.ndarray:
    """int64 (N,): for each sample the first of its group, itself where it stands alone."""
    ones = np.ones(len(pairs), bool)
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(num_samples, num_samples))
    labels = connected_components(graph, directed=False)[1]
    _, first = np.unique(labels, return_index=True)
    return first[labels]
