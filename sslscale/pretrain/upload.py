"""A checkpoint on its way to the store of its run, beside the training."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from sslscale import storage

_ARRIVED = "arrived"
_LOOK_SECONDS = 0.5


def leads_node() -> bool:
    """Whether this rank does for its machine what is done once a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Upload:
    """Uploads what the ranks have written into `folder`; on rank 0, `then` names it once every machine's files are up.

    Every rank makes it, after all have written. On a local path there is nothing to wait for: `then` has run when this
    returns. Elsewhere one rank of each machine uploads in a thread, and says so by a file in the store.
    """

    def __init__(self, folder: Path, then: Callable[[], None]) -> None:
        self._folder, self._then = folder, then
        self._rank = dist.get_rank()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        if storage.remote_url(folder) is None:
            if self._rank == 0:
                then()
            return
        leads = [False] * dist.get_world_size()
        dist.all_gather_object(leads, leads_node())
        self._machines = sum(leads)
        if leads_node():
            self._thread = threading.Thread(target=self._guarded, name="sslscale-upload", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Waits until this rank has done its part; raises what kept it from it."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _guarded(self) -> None:
        try:
            self._upload()
        except Exception as error:  # for the rank's own thread, at its next save
            self._failure = error

    def _upload(self) -> None:
        storage.publish_tree(self._folder)
        storage.write_atomic(self._folder / _ARRIVED / f"{self._rank:05d}", "")
        if self._rank != 0:
            return
        while len(storage.names(self._folder / _ARRIVED)) < self._machines:
            time.sleep(_LOOK_SECONDS)
        self._then()


def fetch(folder: Path) -> None:
    """Brings a named checkpoint to every machine that has a rank; every rank calls it."""
    if storage.remote_url(folder) is not None:
        if leads_node():
            storage.bring_tree(folder)
        dist.barrier()
