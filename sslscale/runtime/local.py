"""Workers without Ray: one in this process, or several in spawned processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from sslscale.runtime.base import Pool, Resources
from sslscale.runtime.device import pick_device
from sslscale.runtime.dispatch import DispatchPool
from sslscale.runtime.worker import Worker, WorkerHost

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the locks and thread pools of torch and faiss


class LocalRuntime:
    """One worker runs in this process; more run in processes of their own, which end with this one, however it ends."""

    name = "local"

    def __init__(self, max_retries: int = 3) -> None:
        self._max_retries = max_retries

    def device(self, name: str) -> str:
        return pick_device(name).type

    def pool(
        self, worker: type, setup: Mapping[str, Any], workers: int, resources: Resources = Resources()
    ) -> contextlib.AbstractContextManager[Pool]:
        gpus = _visible_gpus() if resources.gpus else [None]
        if resources.gpus:
            workers = min(workers, len(gpus))  # one each
        if workers == 1:
            return contextlib.nullcontext(_InlinePool(Worker(worker, setup, resources.threads)))
        return _ProcessPool(pickle.dumps((worker, dict(setup))), resources.threads, workers, self._max_retries, gpus)

    def close(self) -> None:
        """Nothing to release: a pool ends its own workers."""


class _InlinePool:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def map(
        self, method: str, items: Iterable[Any], broadcast: Any = None, *, ordered: bool = False
    ) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(items):
            yield index, self._worker.call(method, item, broadcast)


class _Child:
    """A spawned process and our end of its pipe."""

    def __init__(self, payload: bytes, threads: int, gpu: str | None) -> None:
        self.gpu = gpu
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, payload, threads, gpu), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the child does
        self.holds: bytes | None = None  # the broadcast that it was sent last


class _ProcessPool(DispatchPool[_Child]):
    def __init__(
        self, payload: bytes, threads: int, workers: int, max_retries: int, gpus: Sequence[str | None]
    ) -> None:
        super().__init__(workers, max_retries)
        self._payload, self._threads = payload, threads
        self._free = deque(gpus[at % len(gpus)] for at in range(workers))  # a worker's that is lost is its successor's

    def _start(self) -> _Child:
        return _Child(self._payload, self._threads, self._free.popleft())

    def _publish(self, broadcast: Any) -> bytes:
        return pickle.dumps(broadcast, protocol=pickle.HIGHEST_PROTOCOL)

    def _submit(self, worker: _Child, method: str, item: Any, published: bytes) -> None:
        request = pickle.dumps((method, item, worker.holds is not published))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send_bytes(request)
            if worker.holds is not published:
                worker.connection.send_bytes(published)
                worker.holds = published

    def _wait(self) -> tuple[_Child, bytes | None]:
        by_connection = {worker.connection: worker for worker in self._busy}
        connection = wait(list(by_connection))[0]
        assert isinstance(connection, Connection)
        try:
            return by_connection[connection], connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return by_connection[connection], None

    def _stop(self, worker: _Child) -> None:
        self._free.append(worker.gpu)
        worker.process.kill()
        worker.process.join()
        worker.process.close()
        worker.connection.close()


def _visible_gpus() -> list[str | None]:
    """The names that CUDA_VISIBLE_DEVICES has for the GPUs of this process."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [*given[:count]] if len(given) >= count > 0 and given[0] else [str(number) for number in range(count)]


def _serve(connection: Connection, payload: bytes, threads: int, gpu: str | None) -> None:
    """The life of a spawned process: builds its worker, then answers until its pipe ends."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything initialises CUDA
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    host = WorkerHost()
    broadcast = None
    try:
        connection.send_bytes(host.build(payload, threads))
        while True:
            method, item, renewed = pickle.loads(connection.recv_bytes())
            if renewed:
                broadcast = pickle.loads(connection.recv_bytes())
            connection.send_bytes(host.call(method, item, broadcast))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent closed the pool, or is gone


def end_with_parent() -> None:
    """Ends a worker in the middle of an item too: nobody is left to take its result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
