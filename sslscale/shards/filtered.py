"""A list of shards with records left out: what `dedup` writes, and what a dataset may be given as.

    {"format_version": 1, "shards": [{"name", "url", "samples", "bytes", "sha256", "excluded": [record, ...], ...}]}

The shards stay as they are; whoever reads the list sees the other records, numbered without gaps. Shards that were
packed again since are refused: the numbers would leave out other records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sslscale.shards.tar import TarShard


class FilteredShard:
    """The records of a shard but the excluded ones, as TarShard gives them: `len`, `keys`, `read(i)`, `damage`."""

    def __init__(self, tar: TarShard, excluded: Sequence[int]) -> None:
        self.tar, self.damage = tar, tar.damage
        self._kept = np.setdiff1d(np.arange(len(tar)), excluded)
        self.keys = [tar.keys[record] for record in self._kept.tolist()]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, record: int) -> dict[str, Any]:
        return self.tar.read(int(self._kept[record]))
