"""What runs beside the caller: a worker, its thread limit, and answers that carry a result or an error home."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from sslscale import storage
from sslscale.errors import StageError
from sslscale.runtime.base import compute_threads

# Read when a library loads, and for every thread made later; `compute_threads` reaches those loaded before.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Worker:
    """An instance of a worker's class; it is built, and computes, with exactly `threads` threads."""

    def __init__(self, cls: type, setup: Mapping[str, Any], threads: int) -> None:
        self._threads = threads
        with compute_threads(threads):
            self._instance = cls(**setup)

    def call(self, method: str, item: Any, broadcast: Any) -> Any:
        with compute_threads(self._threads):
            return getattr(self._instance, method)(item, broadcast)


class WorkerHost:
    """Holds the worker of a process of its own. `build` and `call` return an answer, for `open_answer` to read."""

    def build(self, payload: bytes, threads: int) -> bytes:
        """`payload` is the pickled `(class, setup)`: unpickling it imports what the worker computes with."""
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))

        def work() -> None:
            cls, setup = pickle.loads(payload)
            self._worker = Worker(cls, setup, threads)

        return _answer(work)

    def clear(self) -> None:
        """Lets go of the worker; the process, with what it has imported, waits for another."""
        del self._worker

    def call(self, method: str, item: Any, broadcast: Any) -> bytes:
        return _answer(lambda: self._worker.call(method, item, broadcast))


def _answer(work: Callable[[], Any]) -> bytes:
    before = storage.retries()
    try:
        return pickle.dumps((work(), None, None, storage.retries() - before))
    except Exception as error:
        return pickle.dumps((None, _portable(error), traceback.format_exc(), storage.retries() - before))


def _portable(error: Exception) -> Exception:
    """The error itself where it survives pickling, else a StageError that names it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StageError(f"a worker failed: {type(error).__name__}: {error}")
    return error


def open_answer(answer: bytes) -> Any:
    """The result; raises the worker's error as it was, with the worker's traceback as a note."""
    result, error, remote_traceback, retries = pickle.loads(answer)
    storage.count_retries(retries)
    if error is None:
        return result
    error.add_note(f"raised in a worker:\n{remote_traceback}")
    raise error
