"""Glosses of WordNet's noun synsets (Fellbaum 1998), as Debian's package wordnet-base has them: 82,115 short texts.

The label is the lexicographer file, what kind of thing the noun names (animal, food, time ...): 26 of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sslscale.errors import UserError
from sslscale.shards.sources import Example

_DEBIAN = Path("/usr/share/wordnet/data.noun")
_NAMES = """Tops act animal artifact attribute body cognition communication event feeling food group location motive
object person phenomenon plant possession process quantity relation shape state substance time""".split()  # noqa: SIM905
_FIRST = 3  # the number of noun.Tops among all lexicographer files (lexnames, section 5WN)


class WordNet:
    """One split, `train`. `path` is WordNet's data.noun; `every` takes one gloss in so many, of all kinds alike."""

    def __init__(self, path: str | None = None, *, every: int = 1) -> None:
        file = Path(path).expanduser() if path else _DEBIAN
        if not file.is_file():
            raise UserError(
                "WordNet's nouns are not on this machine",
                got=str(file),
                fix="install wordnet-base, or set pack.path",
            )
        data = file.read_bytes()
        # synset_offset lex_filenum ss_type ... | gloss (wndb, section 5WN); the licence above begins with spaces
        lines = [line for line in data.splitlines() if line[:1].isdigit()][::every]
        self.rows = [(line.partition(b" | ")[2].strip(), int(line.split(b" ", 2)[1]) - _FIRST) for line in lines]
        self.splits = {"train": len(self.rows)}
        self.fingerprint = hashlib.sha256(data + f" {every}".encode()).hexdigest()

    def example(self, split: str, index: int) -> Example:
        gloss, label = self.rows[index]
        return Example(gloss, label, "txt", {"class": f"noun.{_NAMES[label]}"})
