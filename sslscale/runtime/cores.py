"""Which cores of its machine a process computes on."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def share_of_cores(cores: Iterable[int], rank: int, ranks: int, threads: int, topology: Path = _TOPOLOGY) -> set[int]:
    """The cores of the `rank`-th of `ranks` processes with so many threads; all where they are too few for that.

    Shares are whole cores beside each other, with their hardware threads, in one socket as far as that goes.
    """

    def place(core: int) -> tuple[int, int, int]:
        folder = topology / f"cpu{core}" / "topology"
        try:
            package, own = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):  # not on every system
            package, own = 0, core
        return package, own, core

    ordered = sorted(cores, key=place)
    if len(ordered) // ranks < threads:
        return set(ordered)
    return set(ordered[rank * len(ordered) // ranks : (rank + 1) * len(ordered) // ranks])


def keep_to_own_cores(threads: int) -> None:
    """Every thread of this process, of several on one machine as torch's launcher numbers them, keeps to its share.

    While one rank waits for another in a collective, its core is idle, and the system would let the other's threads
    wander over to it and back: what has arrived then waits for a core that computes for somebody else, at every layer
    with BatchNorm (benchmarks/two_ranks.py). Processes beside this group still balance within the shares.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if sys.platform != "linux" or ranks == 1:
        return
    own = share_of_cores(_given(), int(os.environ["LOCAL_RANK"]), ranks, threads)
    for thread in Path("/proc/self/task").iterdir():  # those that torch.distributed has started, too
        with contextlib.suppress(OSError):  # one that has just ended
            os.sched_setaffinity(int(thread.name), own)


@functools.cache
def _given() -> set[int]:
    """The cores of this process before it kept to some of them."""
    return os.sched_getaffinity(0)
