"""What `sslscale reduce` found, as the report shows it: the table of codes, and the map with its clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.features import FeatureSet
from sslscale.features.files import open_npy
from sslscale.rundir import RunDir

NO_CLUSTER = -1


@dataclass(frozen=True)
class Reduction:
    """`points` (m, 2) and the cluster of each, (m,), NO_CLUSTER where it has none; both None without a map."""

    result: dict[str, Any]
    points: np.ndarray | None
    clusters: np.ndarray | None


def collect_reduction(run: RunDir, result: dict[str, Any], features: FeatureSet, name: str) -> Reduction:
    """`result` is reduce/<name>/result.json, made from `features`; the clusters are those of cluster/<name>."""
    path = run.stage_path("reduce", name)
    if result["map"] is None:
        return Reduction(result, None, None)
    row_ids = open_npy(path / "map_rows.npy")
    clusters = np.full(len(row_ids), NO_CLUSTER)
    assignments = run.stage_path("cluster", name) / "assignments"
    for number in np.unique(row_ids >> 32).tolist():
        file = assignments / features.parts[number].file
        if storage.bring(file).is_file():
            here = row_ids >> 32 == number
            clusters[here] = open_npy(file)[row_ids[here] & 0xFFFFFFFF]
    return Reduction(result, open_npy(path / "map.npy"), clusters)
