"""Where work runs: the contract of a pool of workers, the same without Ray, in spawned processes, and on a cluster.

A worker is any class: `Worker(**setup)` builds its state once (a loaded model, memory-mapped parts), and each of its
methods takes `(item, broadcast)` and returns a small, picklable result. The state is only a cache: results are pure
over (setup, item, broadcast) and idempotent, so an item may run twice and on any worker. What is computed never
depends on which worker does it, how many there are, or what it did before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sslscale.errors import UserError, did_you_mean

RUNTIMES = ("local", "ray")


@dataclass(frozen=True)
class Resources:
    """What one worker holds. `threads` is what it computes with, equal on every worker."""

    threads: int = 1
    gpus: float = 0.0


class Pool(Protocol):
    """Workers that live until the pool is closed."""

    def map(
        self, method: str, items: Iterable[Any], broadcast: Any = None, *, ordered: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Yields `(index of the item, result)` as results finish; or, `ordered`, by index.

        What is ordered waits for slower items before it. So that little waits where a worker hangs or is lost, the
        others then run ahead of the slowest by two items a worker at most.
        `broadcast` is sent once to each worker, not once an item; a method must not write to it. A lost worker is
        replaced and its item tried again, up to the runtime's `max_retries`, then StageError. An exception that the
        method, or the worker's constructor, raises is not retried: it reaches the caller as it is.
        """
        ...


class Runtime(Protocol):
    """Makes pools. `name` is "local" or "ray"."""

    name: str

    def device(self, name: str) -> str:
        """cpu or cuda: what workers compute on where a config says `name`: auto, cpu or cuda.

        auto takes GPUs where workers may have some now, whatever this process sees. StageError for cuda where there
        never will be any.
        """
        ...

    def pool(
        self, worker: type, setup: Mapping[str, Any], workers: int, resources: Resources = Resources()
    ) -> contextlib.AbstractContextManager[Pool]:
        """A pool of `workers` instances of `worker(**setup)`; closing it ends them."""
        ...

    def close(self) -> None:
        """Releases what the runtime started (a Ray cluster on this machine); what it only joined stays."""
        ...


def make_runtime(name: str, *, address: str | None = None, max_retries: int = 3, verbose: bool = False) -> Runtime:
    """The runtime called `name`; nothing is started before its first pool. `verbose` shows what Ray's workers print."""
    if name not in RUNTIMES:
        raise UserError(f"there is no runtime {name!r}{did_you_mean(name, RUNTIMES)}", allowed=", ".join(RUNTIMES))
    if name == "local":
        from sslscale.runtime.local import LocalRuntime

        return LocalRuntime(max_retries=max_retries)
    from sslscale.runtime.ray import RayRuntime

    return RayRuntime(address=address, max_retries=max_retries, verbose=verbose)


@contextlib.contextmanager
def compute_threads(threads: int) -> Iterator[None]:
    """Holds every thread pool of this process (BLAS, OpenMP, torch, faiss) at `threads`, and restores them."""
    import sys

    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    if torch:
        torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        if torch:
            torch.set_num_threads(before)
