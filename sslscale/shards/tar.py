"""Tar bytes into samples: headers parsed over a memory map, records read at random."""

from __future__ import annotations


class SampleError(Exception):
    """A record that gives no sample; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
