"""Dispatching over workers in processes of their own: who gets which item, and what happens when one is lost."""

from __future__ import annotations

import abc
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sslscale.errors import StageError
from sslscale.runtime.worker import open_answer

Handle = TypeVar("Handle", bound=Hashable)

_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 5.0
_LOST_AT_WORK = "look for the out-of-memory killer (dmesg)"
_LOST_AT_START = (
    'what it printed is above; a script of your own calls sslscale under `if __name__ == "__main__":`, since its '
    "workers import it; else look for the out-of-memory killer (dmesg)"
)
AHEAD = 2  # items a worker that may be given out beyond the oldest that is not finished, where results are ordered


@dataclass
class _Task:
    call: int  # which `map` it belongs to
    index: int
    item: Any
    losses: int = 0


class DispatchPool(abc.ABC, Generic[Handle]):
    """The half of a pool that every runtime shares; a runtime starts, feeds, awaits and stops the workers.

    Only a worker that has been built gets an item, and one at a time, so a slow or pending worker holds nothing up.
    """

    def __init__(self, workers: int, max_retries: int) -> None:
        self._size, self._max_retries = workers, max_retries
        self._idle: deque[Handle] = deque()
        self._busy: dict[Handle, _Task | None] = {}  # None: the worker is being built
        self._call = 0
        self._failed_starts = 0  # since a worker was last built

    @abc.abstractmethod
    def _start(self) -> Handle:
        """Begins to build a worker; its first answer says how that went."""

    @abc.abstractmethod
    def _publish(self, broadcast: Any) -> Any:
        """Prepares, once a `map`, what `_submit` gives to each worker."""

    @abc.abstractmethod
    def _submit(self, worker: Handle, method: str, item: Any, published: Any) -> None:
        """Gives an item to an idle worker. A worker that is found dead is left for `_wait` to report."""

    @abc.abstractmethod
    def _wait(self) -> tuple[Handle, bytes | None]:
        """Blocks until one of `_busy` answers, or is lost (None)."""

    @abc.abstractmethod
    def _stop(self, worker: Handle) -> None:
        """Ends a worker at once, whatever it does; one that is dead already is fine."""

    def _release(self, worker: Handle) -> None:
        """Gives back an idle worker; a runtime may keep its process for a later pool."""
        self._stop(worker)

    def __enter__(self) -> DispatchPool[Handle]:
        for _ in range(self._size):
            self._busy[self._start()] = None
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._busy:
            self._stop(worker)
        for worker in self._idle:
            self._release(worker)
        self._idle.clear()
        self._busy.clear()

    def map(
        self, method: str, items: Iterable[Any], broadcast: Any = None, *, ordered: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """See `Pool.map`. One at a time: a new one abandons the one before, and drops what that still answers."""
        if not ordered:
            yield from self._map(method, items, broadcast, lambda index: True)
            return
        waiting: dict[int, Any] = {}
        following = 0

        def is_near(index: int) -> bool:
            return index < following + AHEAD * self._size

        for found, result in self._map(method, items, broadcast, is_near):
            waiting[found] = result
            while following in waiting:
                yield following, waiting.pop(following)
                following += 1

    def _map(
        self, method: str, items: Iterable[Any], broadcast: Any, may_start: Callable[[int], bool]
    ) -> Iterator[tuple[int, Any]]:
        """Results as they finish, of items that are given out as long as `may_start(index)` of the next one."""
        self._call += 1
        published = self._publish(broadcast)
        pending = deque(_Task(self._call, index, item) for index, item in enumerate(items))
        unfinished = len(pending)
        while unfinished:
            while pending and self._idle and may_start(pending[0].index):
                self._submit(self._idle[0], method, pending[0].item, published)
                self._busy[self._idle.popleft()] = pending.popleft()
            worker, answer = self._wait()
            task = self._busy.pop(worker)
            if answer is None:
                self._replace(worker, task)
                if task is not None and task.call == self._call:
                    pending.appendleft(task)
            elif task is None:
                self._admit(worker, answer)
            else:
                self._idle.append(worker)
                if task.call == self._call:
                    unfinished -= 1
                    yield task.index, open_answer(answer)

    def _admit(self, worker: Handle, answer: bytes) -> None:
        """Takes in a worker that says it is built; one that failed to build is ended, and its error raised."""
        try:
            open_answer(answer)
        except Exception:
            self._stop(worker)
            raise
        self._failed_starts = 0
        self._idle.append(worker)

    def _replace(self, worker: Handle, task: _Task | None) -> None:
        """Starts another worker for one that was lost, at `task` or (None) while it was being built."""
        self._stop(worker)
        if task is None or task.call == self._call:
            self._count_loss(task)
        self._busy[self._start()] = None

    def _count_loss(self, task: _Task | None) -> None:
        """Waits a little, longer each time; raises StageError when it happened too often."""
        if task is None:
            self._failed_starts += 1
            losses, where, cause = self._failed_starts, "before it was ready", _LOST_AT_START
        else:
            task.losses += 1
            losses, where, cause = task.losses, f"at item {task.index}", _LOST_AT_WORK
        if losses > self._max_retries:
            raise StageError(
                f"a worker was lost {where}, and so was each that replaced it",
                got=f"{losses} lost",
                allowed=f"{self._max_retries} (runtime.max_retries)",
                fix=f"{cause}; what is finished is kept, so the same command goes on",
            )
        time.sleep(min(_BACKOFF_SECONDS * 2 ** (losses - 1), _LONGEST_BACKOFF_SECONDS))
