"""All ranks of a pretraining run again when one is lost: the driver's side, whatever places the ranks.

start the group at a number of ranks that there is room for -> wait
    done, or an error that would only come again  -> say so
    a stop was asked for, and the ranks have saved -> Interrupted
    a rank was lost                                -> again, from the last checkpoint, while checkpoints still come
    another placement was asked for                -> again

Neither torch's launcher nor Ray Train restarts by itself: they could not tell a lost rank from an error that would
only come again, and a number of ranks that they chose might not divide the streams.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sslscale import lease, storage
from sslscale.config import PretrainConfig
from sslscale.errors import EXIT_SIGINT, EXIT_SIGTERM, StageError, UserError
from sslscale.pretrain.ranks import MOVE, OUTCOME, STACKS, STOP
from sslscale.rundir import read_json

_LOOK_SECONDS = 10.0  # between looks at whether the cluster has room for more ranks


class NoRoom(Exception):
    """The group found no places within the time that it waits for them: no rank has run."""


class Group(Protocol):
    """Where ranks run. `shares_process`: a single rank runs in this process."""

    shares_process: bool
    device: str
    """cpu or cuda: what every rank computes on."""

    def room(self) -> int:
        """How many ranks the machines that are there now would hold."""
        ...

    def spare(self) -> int:
        """How many ranks would find a place beside what runs now."""
        ...

    def run(self, settings: dict[str, Any], size: int) -> None:
        """Runs `size` ranks to their end. Raises a rank's UserError, NoRoom, or whatever tells that a rank was lost."""
        ...


class Restarts:
    """The restarts of one call."""

    def __init__(
        self,
        folder: Path,
        config: PretrainConfig,
        group: Group,
        tick: Callable[[], None],
        interrupted: Sequence[int] = (),
    ) -> None:
        self.folder, self.config, self.group, self.tick = folder, config, group, tick
        self._interrupted = interrupted
        self.sizes = config.world_sizes
        self.restarts = self.moves = 0
        self.left = config.max_restarts
        self._looked = time.monotonic()
        self._stop_told = False

    def until_done(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Rank 0's result; None where the ranks have saved and stopped because they were asked to."""
        limit = self.sizes[-1]
        while True:
            size = largest(self.sizes, min(limit, self.group.room()))
            before = self._newest()
            failure = self._attempt(settings, size)
            if isinstance(failure, UserError):
                raise failure
            if isinstance(failure, NoRoom):
                if storage.appeared(self.folder / STOP, every=0.0):
                    return None
                limit = largest(self.sizes, size - 1)
                _say(f"no room for {size} ranks yet, waiting")
                continue
            limit = self.sizes[-1]
            if failure is not None:
                self._count_loss(failure, progressed=self._newest() != before)
                continue
            outcome = read_json(storage.refresh(self.folder / OUTCOME))
            if outcome["finished"]:
                storage.pull(self.folder)
                retries = outcome["result"].pop("storage_retries")
                storage.count_retries(0 if self.group.shares_process else retries)
                return {**outcome["result"], "restarts": self.restarts, "moves": self.moves}
            if storage.appeared(self.folder / STOP, every=0.0):
                return None
            self.moves += 1
            _say("the ranks have saved, and start again where there is room")

    def _attempt(self, settings: dict[str, Any], size: int) -> BaseException | None:
        self._was_full = False
        for name in (OUTCOME, MOVE):
            storage.remove(self.folder / name)
        stacks = self.folder / STACKS / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.restarts + self.moves}"
        try:
            return _watch(lambda: self.group.run({**settings, "stacks": str(stacks)}, size), lambda: self._tick(size))
        finally:
            _discard_empty(self.folder / STACKS)

    def _tick(self, size: int) -> None:
        """Shows the progress, hands on a stop, and asks the ranks to save and move where more would find a place."""
        self.tick()
        if self._interrupted and not self._stop_told:
            self._stop_told = True
            storage.write_atomic(self.folder / STOP, "")  # the handler has made it here only
        if size < self.sizes[-1] and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            grows = largest(self.sizes, size + min(self.group.spare(), self.group.room() - size)) > size
            if grows and self._was_full:  # else the places seen may be those that this group is about to take
                storage.write_atomic(self.folder / MOVE, "")
            self._was_full = not grows

    def _count_loss(self, failure: BaseException, progressed: bool) -> None:
        self.left = (self.config.max_restarts if progressed else self.left) - 1
        if self.left < 0 or storage.appeared(self.folder / STOP, every=0.0):
            lines = str(failure).strip().splitlines()
            raise StageError(
                "pretrain: the ranks stopped before the end, and restarting them did not help",
                got=lines[-1] if lines else type(failure).__name__,
                fix="run the same command again: it goes on from the last checkpoint; "
                f"{self.folder / STACKS} says where each rank was (-v shows the ranks' own output)",
            ) from failure
        self.restarts += 1
        _say(f"a rank was lost ({type(failure).__name__}); restart {self.restarts}, from the last checkpoint")

    def _newest(self) -> str | None:
        listing = self.folder / "checkpoints.json"
        return read_json(listing)["checkpoints"][-1]["name"] if storage.refresh(listing).is_file() else None


def largest(sizes: list[int], most: int) -> int:
    """The largest of the ascending `sizes` that is at most `most`; the smallest where none is."""
    return max((size for size in sizes if size <= most), default=sizes[0])


def _say(what: str) -> None:
    print(f"pretrain: {what}", file=sys.stderr, flush=True)


def _discard_empty(stacks: Path) -> None:
    """Ranks that ended well, or were killed, have left nothing to read."""
    for file in stacks.glob("*/*"):
        if file.stat().st_size == 0:
            file.unlink()
    for folder in (*stacks.glob("*"), stacks):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _watch(work: Callable[[], None], tick: Callable[[], None]) -> BaseException | None:
    """Runs `work` beside this thread, so that signals and the progress line stay with the main thread."""
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=guarded, name="sslscale-ranks", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
        tick()
    return failure[0] if failure else None


@contextlib.contextmanager
def stop_on_signal(stop_file: Path) -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask the ranks to save and stop at their next step; a second one is not caught."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if lease.lost():
            raise KeyboardInterrupt  # to ask the ranks would be to ask those of who holds the run now
        received.append(EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM)
        stop_file.touch()
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
