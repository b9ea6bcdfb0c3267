"""A corpus that grows: the shards that a store was made from, in the order in which they came, and its parts.

embed/<dataset>/corpus.json   {"generations": [[[name, samples, bytes, content, ...], ...], ...]}

Parts never mix generations, so shards that come later change no part that is there, wherever their names sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslscale.rundir import hash_json, read_json, write_json
from sslscale.shards.dataset import ShardSet
from sslscale.shards.plan import Span, plan_parts

FILE = "corpus.json"


@dataclass(frozen=True)
class Corpus:
    """`generations` lists the shards of each: `[name, samples, bytes, content]`, and a hash of what is left out."""

    generations: Sequence[Sequence[Any]]
    changed: Sequence[str] = ()
    """Shards of the corpus that the folder holds which are gone or others by now; this is another corpus then."""

    @classmethod
    def of(cls, shards: ShardSet, folder: Path) -> Corpus:
        """The corpus that `folder` holds, with a further generation for the shards that are new.

        Where a shard that it holds is gone or another by now, a corpus of `shards` alone.
        """
        now = dict(zip([info.name for info in shards.shards], _records(shards), strict=True))
        known = read_json(folder / FILE)["generations"] if (folder / FILE).is_file() else []
        old = {record[0]: record for generation in known for record in generation}
        changed = [name for name, record in old.items() if name not in now or not _same(record, now[name])]
        if changed:
            known, old = [], {}
        new = [record for name, record in now.items() if name not in old]
        return cls([*known, new] if new or not known else known, changed)

    @property
    def origin(self) -> str:
        """The hash of the first generation: it stays when the corpus grows."""
        return hash_json(self.generations[0])

    @property
    def fingerprint(self) -> str:
        return hash_json(self.generations)

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, {"generations": self.generations})

    def parts(self, shards: ShardSet, part_rows: int) -> list[list[Span]]:
        """The spans of every part: `part_rows` samples each, the last one of a generation fewer."""
        number = {info.name: at for at, info in enumerate(shards.shards)}
        parts: list[list[Span]] = []
        for generation in self.generations:
            own = [number[record[0]] for record in generation]
            planned = plan_parts([record[1] for record in generation], part_rows)
            parts += [[replace(span, shard=own[span.shard]) for span in spans] for spans in planned]
        return parts


def _records(shards: ShardSet) -> list[list[Any]]:
    counts = shards.counts.tolist()
    return [
        [info.name, count, info.bytes, info.content, *([hash_json(info.excluded)] if info.excluded else [])]
        for info, count in zip(shards.shards, counts, strict=True)
    ]


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """The same shard, as far as both say: an index made from the headers knows no sha256."""
    if [*before[:3], *before[4:]] != [*now[:3], *now[4:]]:
        return False
    return before[3] == now[3] or _kind(before[3]) != _kind(now[3])


def _kind(content: str | None) -> str:
    """What ShardInfo.content is: nothing, a hash, or a layout."""
    return "" if content is None else content.rpartition(":")[0] or "sha256"
