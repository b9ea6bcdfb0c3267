"""One live progress line on a terminal, plain lines otherwise; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """`with Progress("embed", total=1000, unit="samples") as progress: progress.advance(10, wait=0.1)`.

    Shows items, rate and ETA, and any extra figures given to `advance`. On a terminal it redraws one line; elsewhere
    it prints a line every `every` seconds and one at the end.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "items", every: float = 10.0) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done, self.extra = 0, {}  # type: int, dict[str, Any]
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._start = self._shown = time.monotonic()
        self._offset = 0
        return self

    def start_at(self, done: int) -> None:
        """What an earlier call of the same stage had finished: it counts as done, not towards the rate."""
        self.done = self._offset = done

    def advance(self, count: int = 1, **extra: Any) -> None:
        self.done += count
        self.extra.update(extra)
        now = time.monotonic()
        if now - self._shown >= (0.1 if self._live else self.every):
            self._shown = now
            self._print(end="" if self._live else "\n")

    def __exit__(self, *exc: object) -> None:
        self._print(end="\n")

    def _print(self, end: str) -> None:
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._offset) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}", f"{rate:,.0f}/s"]
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{(self.total - self.done) / rate:.0f} s left")
        elif self.done:
            parts.append(f"{elapsed:.1f} s")
        parts += [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.extra.items()
        ]
        line = f"{self.label}: " + ", ".join(parts)
        print(f"\r\x1b[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)
