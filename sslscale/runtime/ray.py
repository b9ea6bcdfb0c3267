"""Workers as Ray actors, on a cluster that is joined or started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray import ObjectRef, cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import AuthenticationError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError

from sslscale.errors import UserError
from sslscale.runtime.address import cluster_address, unreachable
from sslscale.runtime.base import Pool, Resources
from sslscale.runtime.device import pick_device
from sslscale.runtime.dispatch import DispatchPool
from sslscale.runtime.worker import WorkerHost

_OBJECT_STORE_BYTES = 2**30  # it holds broadcasts and small results only
_MIN_CPUS = 4  # Ray's count of places, not of cores: two workers and two ranks fit on the smallest machine
_LONGEST_TEMP_DIR = 40  # characters: the paths of Ray's sockets grow by 63 from it, and may have 107
_PATIENCE_SECONDS = 30.0
_LOST = (RayActorError, NodeDiedError, OutOfMemoryError, ObjectLostError)


class RayRuntime:
    """Runs workers as actors.

    `address` joins a cluster, as `cluster_address` reads it; without one a cluster is started on this machine. A Ray
    that this process has initialised before is used as it is, and left running by `close`. `verbose` shows what workers
    print.
    """

    name = "ray"

    def __init__(self, address: str | None = None, max_retries: int = 3, verbose: bool = False) -> None:
        self._address = cluster_address(address)
        self._max_retries, self._verbose = max_retries, verbose
        self._connected_here = False
        self._warm: dict[int, list[ActorHandle]] = {}  # by their threads

    def start(self, cpus: int = 0) -> None:
        """Initialises Ray, once. A cluster on this machine has at least `cpus` places for ranks and workers afterwards.

        One that was started with fewer makes room for another, so no pool may be open where `cpus` are asked for.
        Call it from the main thread: the processes of a local cluster end with the thread that started them.
        """
        if self.alone and ray.cluster_resources().get("CPU", 0) < cpus:
            self.close()
        if ray.is_initialized():
            return
        assert threading.current_thread() is threading.main_thread()
        if self._address and (reason := unreachable(self._address)):
            raise _not_started(self._address, reason)
        options = {"address": self._address} if self._address else _local_cluster(cpus)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options, logging_level=logging.ERROR, log_to_driver=self._verbose)
        except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
            raise _not_started(self._address, str(error) or type(error).__name__) from error
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own, which would exit with 15
        self._connected_here = True

    @property
    def alone(self) -> bool:
        """Whether this process started the cluster, for itself."""
        return self._connected_here and self._address is None

    def device(self, name: str) -> str:
        if name == "cpu":
            return name
        self.start()
        here = ray.cluster_resources().get("GPU", 0) > 0
        if name == "cuda" and not here and self.alone:
            return pick_device(name).type
        return "cuda" if here or name == "cuda" else "cpu"  # a cluster that grows gets GPUs once they are asked for

    def pool(
        self, worker: type, setup: Mapping[str, Any], workers: int, resources: Resources = Resources()
    ) -> contextlib.AbstractContextManager[Pool]:
        self.start()
        places = (
            0 if self.alone else resources.threads
        )  # on one machine threads may share cores, as they do without Ray
        options = {"num_cpus": places, "num_gpus": resources.gpus}
        payload = cloudpickle.dumps((worker, dict(setup)))
        # On a cluster of our own, processes wait for the next pool with their imports done; elsewhere they would hold
        # places that others need.
        warm = self._warm.setdefault(resources.threads, []) if self.alone and not resources.gpus else None
        return _ActorPool(payload, resources, options, workers, self._max_retries, warm)

    def close(self) -> None:
        self._warm.clear()
        if self._connected_here:
            ray.shutdown()
            self._connected_here = False


def _local_cluster(cpus: int) -> dict[str, Any]:
    """Arguments of `ray.init` for a small cluster on this machine, without dashboard and usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the one switch that Ray has for a single session
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, _MIN_CPUS, cpus),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    if "RAY_TMPDIR" not in os.environ and len(tempfile.gettempdir()) > _LONGEST_TEMP_DIR:
        options["_temp_dir"] = "/tmp/ray"
    return options


def _not_started(address: str | None, reason: str) -> UserError:
    got = reason.strip().splitlines()[0]
    if address is None:
        return UserError("Ray could not be started on this machine", got=got, fix="--runtime local works without Ray")
    return UserError(
        "the Ray cluster could not be joined",
        got=f"{address}: {got}",
        fix="check the address and that the cluster runs; with token authentication, set RAY_AUTH_MODE=token here too",
    )


class _ActorPool(DispatchPool[ActorHandle]):
    def __init__(
        self,
        payload: bytes,
        resources: Resources,
        options: dict[str, Any],
        workers: int,
        max_retries: int,
        warm: list[ActorHandle] | None,
    ) -> None:
        super().__init__(workers, max_retries)
        self._payload = ray.put(payload)
        self._threads, self._options, self._warm = resources.threads, options, warm
        self._answers: dict[ObjectRef, ActorHandle] = {}
        self._told_to_wait = False

    def _start(self) -> ActorHandle:
        actor: Any = self._warm.pop() if self._warm else ray.remote(WorkerHost).options(**self._options).remote()
        self._answers[actor.build.remote(self._payload, self._threads)] = actor
        return actor

    def _publish(self, broadcast: Any) -> ObjectRef:
        return ray.put(broadcast)

    def _submit(self, worker: ActorHandle, method: str, item: Any, published: ObjectRef) -> None:
        self._answers[worker.call.remote(method, item, published)] = worker

    def _wait(self) -> tuple[ActorHandle, bytes | None]:
        ready: list[ObjectRef] = []
        while not ready:
            ready, _ = ray.wait(list(self._answers), timeout=_PATIENCE_SECONDS)
            if not ready and not self._idle and all(task is None for task in self._busy.values()):
                self._tell_to_wait()
        worker = self._answers.pop(ready[0])
        try:
            return worker, ray.get(ready[0])
        except _LOST:
            return worker, None

    def _stop(self, worker: ActorHandle) -> None:
        ray.kill(worker)
        self._answers = {ref: other for ref, other in self._answers.items() if other != worker}

    def _release(self, worker: ActorHandle) -> None:
        if self._warm is None:
            self._stop(worker)
        else:
            worker.clear.remote()
            self._warm.append(worker)

    def _tell_to_wait(self) -> None:
        """Once, where no worker finds a place: the cluster may grow, or may never have room."""
        if not self._told_to_wait:
            self._told_to_wait = True
            needs = f"{self._options['num_cpus']:g} CPUs and {self._options['num_gpus']:g} GPUs"
            print(f"waiting for room on the Ray cluster: a worker needs {needs}", file=sys.stderr, flush=True)
