"""A shard: one faiss index over some parts. Workers build them, each from its parts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from sslscale import storage
from sslscale.features import FeatureSet
from sslscale.features.distance import prepare
from sslscale.features.files import open_npy, replacing, write_npy

ADD_VALUES = 2**22  # of rows added at once: enough for the products to run at full speed
OPEN = faiss.IO_FLAG_MMAP_IFC  # searched from the pages of its file, which all that open it share


@dataclass(frozen=True)
class Group:
    """What a shard is built from: `(number in the index, number in the features)` of parts, and the rows left out.

    `name` says all of it, so a file of this name is the shard. `base` is the file of the index that the rows are added
    to, and `base_rows` that of its row ids.
    """

    name: str
    rows: int
    parts: Sequence[tuple[int, int]]
    left_out: np.ndarray
    base: str = "trained.faiss"
    base_rows: str | None = None


class BuildWorker:
    """Builds shards into `folder`/shards. `features` are the paths of a feature set."""

    def __init__(self, *, folder: str, features: dict[str, str], metric: str) -> None:
        self.folder, self.metric = Path(folder), metric
        self.features = FeatureSet.open(features)

    def build(self, group: Group, broadcast: Any = None) -> dict[str, Any]:
        """Writes a shard, its row ids first; returns the record of its files."""
        index = faiss.read_index(str(storage.bring(self.folder / group.base)))
        row_ids = [open_npy(self.folder / group.base_rows) if group.base_rows else np.empty(0, np.int64)]
        block = max(1, ADD_VALUES // self.features.dim)
        for number, part in group.parts:
            for start in range(0, self.features.parts[part].rows, block):
                rows = self.features.block(part, start, start + block)
                own = (number << 32) + np.arange(start, start + len(rows))
                kept = ~np.isin(own, group.left_out)
                if kept.any():  # some indexes take no empty block
                    index.add(prepared(rows if kept.all() else rows[kept], self.metric))
                row_ids.append(own[kept])
        files = (f"shards/{group.name}.npy", f"shards/{group.name}.faiss")
        write_npy(self.folder / files[0], np.concatenate(row_ids))
        write_index(index, self.folder / files[1])
        return shard_record(self.folder, index.ntotal, index=files[1], rows=files[0])


def prepared(rows: np.ndarray, metric: str) -> np.ndarray:
    return np.ascontiguousarray(prepare(rows, metric), dtype=np.float32)


def write_index(index: faiss.Index, path: Path) -> None:
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))


def shard_record(folder: Path, vectors: int, *, index: str, rows: str) -> dict[str, Any]:
    """What result.json says of a shard, see `ShardFiles`."""
    sizes = {file: (folder / file).stat().st_size for file in (index, rows)}
    return {"vectors": int(vectors), "index": index, "rows": rows, "sizes": sizes}
