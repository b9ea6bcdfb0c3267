"""Who holds a run directory: one process at a time, on disks, mounts and object stores alike."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslscale import storage
from sslscale.errors import StageError, UserError

HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0
_START_TOLERANCE_SECONDS = 2.0  # the kernel's idea of when it booted moves as the clock is corrected

_lost = threading.Event()


def lost() -> bool:
    """Whether the run that this process held last is another's now: nothing more may be written to it."""
    return _lost.is_set()


class Lease:
    """RUN/.lease/<number>: who holds the directory, renewed by a heartbeat.

    A lease is taken by creating the next number: of many who try, one succeeds, on disks, mounts and object stores
    alike. So a dead holder's successor is one process, too, and the holder who was only slow finds a higher number at
    its next heartbeat and stops at once, as if interrupted, without saving. A holder on this machine whose process is
    gone is dead at once; one elsewhere is dead when its heartbeat is older than LEASE_SECONDS.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / ".lease"
        self.token = f"{_machine()}:{os.getpid()}:{time.time_ns()}"
        self.path: Path | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sslscale-lease", daemon=True)

    def acquire(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = self._numbers()
            if (holder := self._living(numbers)) is not None:
                raise _in_use(self.run, holder)
            own = max(numbers, default=0) + 1
            if not storage.create(self._file(own), json.dumps(self._record()).encode()):
                raise _in_use(self.run, self._read(own))
            self.path = self._file(own)
            self._check_alone(own)
            _lost.clear()
        except OSError as error:
            raise UserError(
                "the run directory cannot be written",
                got=f"{storage.shown(self.run)}: {error.strerror or error}",
                fix="give another --run",
            ) from None
        self._thread.start()

    def holder(self) -> dict[str, Any] | None:
        """The living process that holds the directory, if any: its `machine`, `pid` and the `time` of its heartbeat."""
        return self._living(self._numbers())

    def _living(self, numbers: list[int]) -> dict[str, Any] | None:
        holder = self._read(numbers[-1]) if numbers else None
        return holder if _alive(holder) else None

    def _check_alone(self, own: int) -> None:
        """Somebody may have come and gone, and another have begun at 1, between our look and our step."""
        assert self.path is not None
        others = [number for number in self._numbers() if number != own]
        for number in others:
            if _alive(holder := self._read(number)):
                storage.remove(self.path)
                raise _in_use(self.run, holder)
        for number in others:
            storage.remove(self._file(number))

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self.path is not None
        with contextlib.suppress(OSError, StageError):
            storage.remove(self.path)
            self.folder.rmdir()
            if not any(self.run.iterdir()):  # nothing was started
                self.run.rmdir()

    def _beat(self) -> None:
        assert self.path is not None
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, StageError):  # a full disk must not end the work; the lease runs out then
                newest = self._numbers()[-1:]
                if not newest or self._file(newest[0]) != self.path:
                    holder = self._read(newest[0]) if newest else None
                    print(f"error: {_in_use(self.run, holder)}", file=sys.stderr, flush=True)
                    _lost.set()
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                storage.write_atomic(self.path, json.dumps(self._record()))

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in storage.names(self.folder) if name.isdigit())

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _read(self, number: int) -> dict[str, Any] | None:
        """The holder of a number; None where it is gone."""
        path = storage.refresh(self._file(number))
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:  # its name is being written, or was never finished
            return {"machine": "a machine that gave no name", "pid": "?", "time": path.stat().st_mtime}

    def _record(self) -> dict[str, Any]:
        process = {"machine": _machine(), "pid": os.getpid(), "start": _start_time(os.getpid())}
        return {"token": self.token, **process, "time": time.time()}


def _alive(holder: Mapping[str, Any] | None) -> bool:
    if holder is None:
        return False
    if holder["machine"] != _machine():
        return time.time() - holder["time"] < LEASE_SECONDS
    start = _start_time(holder["pid"])
    return start is not None and abs(start - holder["start"]) < _START_TOLERANCE_SECONDS


def _in_use(run: Path, holder: Mapping[str, Any] | None) -> UserError:
    who = f"pid {holder['pid']} on {holder['machine'].partition(' ')[0]}" if holder else "another process"
    return UserError(
        "the run directory is in use by another process",
        got=f"{storage.shown(run)} is held by {who}",
        fix="wait for it to end, or give another --run",
    )


def _machine() -> str:
    """Where a pid means something: the host and, on Linux, the namespace of pids (containers may share a name)."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}".strip()


def _start_time(pid: int) -> float | None:
    """When the process started, or None where there is none: tells a reused pid from the holder's."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
