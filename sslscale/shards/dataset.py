"""A dataset: tar shards at a URL and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ShardInfo:
    """One shard as shards.json describes it: `samples` is what it promises to hold."""

    name: str
    url: str
    samples: int
    bytes: int
    sha256: str | None = None


class ShardSet:
    """`.url .shards .counts .offsets .num_samples .fingerprint`; global sample id = offsets[shard] + record."""

    def __init__(self, url: str, shards: list[ShardInfo], cache: Path | None = None) -> None: ...

    def local_path(self, info: ShardInfo) -> Path:
        raise NotImplementedError


def open_shards(url: str, cache: Path | None = None) -> ShardSet:
    """The shards at a folder, a single tar or a brace range; any fsspec URL."""
    raise NotImplementedError
