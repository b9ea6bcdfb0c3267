"""One run's folder: manifest, stages with their identity, part markers, failures, metrics and the lease.

RUN/manifest.json                   who made it: command, versions, hardware, seeds, what each stage counted
RUN/config.yaml                     resolved
RUN/.lease                          the process that holds the directory, with a heartbeat
RUN/<kind>[/<name>]/stage.json      the stage's identity: its settings and its parents; written first
RUN/<kind>[/<name>]/done/<part>     a marker per finished part (its content is the part's own result)
RUN/<kind>[/<name>]/failed/<part>.jsonl   what was lost, with the key and the reason
RUN/<kind>[/<name>]/result.json     written last: whatever has none is not done
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sslscale.errors import StageError, UserError

FORMAT_VERSION = 1
HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0
_LOCK = ".lease.lock"
_SETTLE_SECONDS = 0.05
_START_TOLERANCE_SECONDS = 2.0  # the kernel's idea of when it booted moves as the clock is corrected


# ------------------------------------------------------------------ small files


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; a UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError("a file that this needs is missing", got=str(path)) from None
    except json.JSONDecodeError as error:
        raise UserError("a file is not valid JSON", got=f"{path}: {error}") from None


def hash_json(value: Any) -> str:
    """A stable short hash of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


# ------------------------------------------------------------------ a stage


class Stage:
    """One stage's folder. Made by `RunDir.open_stage`; `done` says whether there is nothing left to do."""

    def __init__(
        self, path: Path, kind: str, name: str | None, settings: Mapping[str, Any], parents: Mapping[str, str]
    ):
        self.path, self.kind, self.name = path, kind, name
        self.settings, self.parents = dict(settings), dict(parents)
        self.identity = hash_json({"settings": self.settings, "parents": self.parents})

    @property
    def done(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def part_done(self, part: str) -> dict[str, Any] | None:
        """What `finish_part` recorded for this part, or None."""
        marker = self.path / "done" / part
        return json.loads(marker.read_text()) if marker.is_file() else None

    def finish_part(self, part: str, record: Mapping[str, Any], failures: Iterable[Mapping[str, Any]] = ()) -> None:
        """Commits a part: its failures first (`key`, `reason`), its marker last."""
        lines = [json.dumps(dict(failure)) for failure in failures]
        file = self.path / "failed" / f"{part}.jsonl"
        if lines:
            write_atomic(file, "\n".join(lines) + "\n")
        else:
            file.unlink(missing_ok=True)  # of an earlier attempt that was killed before its marker
        write_json(self.path / "done" / part, dict(record))

    def failures(self) -> Iterator[dict[str, Any]]:
        for file in sorted((self.path / "failed").glob("*.jsonl")):
            yield from map(json.loads, file.read_text().splitlines())

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes result.json, last. Returns it as read back."""
        write_json(self.path / "result.json", {"format_version": FORMAT_VERSION, "identity": self.identity, **result})
        return self.result

    def check_failed_share(self, failed: int, total: int, allowed: float) -> None:
        """Raises StageError (exit 1) when more than `allowed` of the samples failed."""
        if total and failed / total > allowed:
            raise StageError(
                f"{self.kind}: too many samples failed",
                got=f"{failed} of {total} ({failed / total:.2%})",
                allowed=f"at most {allowed:.2%} ({self.kind}.max_failed_share)",
                fix=f"read the reasons in {self.path / 'failed'}, or raise {self.kind}.max_failed_share",
            )


class Metrics:
    """metrics.jsonl: one JSON object a line, appended. A line cut off by a crash is dropped on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            kept = path.read_bytes().rpartition(b"\n")
            write_atomic(path, kept[0] + kept[1])

    def append(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []

    def read_new(self) -> list[dict[str, Any]]:
        """The whole lines that were added since the last call, for a reader beside the writer."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            self._seen = min(self._seen, file.seek(0, os.SEEK_END))  # shorter: a restart has dropped lines
            file.seek(self._seen)
            whole = file.read().rpartition(b"\n")[0]
        self._seen += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def keep(self, wanted: Any) -> None:
        """Drops the lines for which `wanted(line)` is false (what was logged after the checkpoint resumed from)."""
        lines = [line for line in self.read() if wanted(line)]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------ a run


class RunDir:
    """A run directory, held by this process while it is open (`with RunDir(path) as run`)."""

    def __init__(self, path: str | Path) -> None:
        if "://" in str(path):
            raise UserError("a run directory is a local or mounted folder", got=str(path), fix="give a path with --run")
        self.path = Path(path).expanduser().absolute()
        self.on_start: Callable[[], None] = lambda: None
        """Called when a stage is accepted that is not done: from then on this command changes the run."""
        self._lease: _Lease | None = None

    def __enter__(self) -> RunDir:
        self._lease = _Lease(self.path)
        self._lease.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._lease is not None
        self._lease.release()

    def stage_path(self, kind: str, name: str | None = None) -> Path:
        return self.path / kind / name if name else self.path / kind

    def open_stage(
        self,
        kind: str,
        name: str | None,
        settings: Mapping[str, Any],
        parents: Mapping[str, str],
        *,
        overwrite: bool = False,
    ) -> Stage:
        """The stage's folder, new or to be continued.

        `settings` is the config's `identity()` with seed and threads where they matter; `parents` maps each input
        (a dataset, a backbone, a feature store) to its hash. Another identity than the one on disk is refused, with
        the settings that differ; `overwrite` throws the old one away instead.
        """
        stage = Stage(self.stage_path(kind, name), kind, name, settings, parents)
        record = stage.path / "stage.json"
        if record.is_file():
            known = read_json(record)
            if known["identity"] == stage.identity:
                if not stage.done:
                    self.on_start()
                return stage
            if not overwrite:
                raise _other_identity(stage, known)
        if _holds_other_things(stage.path) and not overwrite:
            raise UserError(
                f"{stage.path} holds something else than a stage",
                fix="--overwrite throws it away, or choose another --run or --name",
            )
        discard(stage.path)
        self.on_start()
        write_json(
            record,
            {
                "format_version": FORMAT_VERSION,
                "identity": stage.identity,
                "settings": stage.settings,
                "parents": stage.parents,
            },
        )
        return stage

    def record(self, **values: Any) -> None:
        """Merges values into manifest.json, one level deep (`record(counts={"embed": 10})` keeps other counts)."""
        path = self.path / "manifest.json"
        manifest: dict[str, Any] = read_json(path) if path.is_file() else {"format_version": FORMAT_VERSION}
        for key, value in values.items():
            if isinstance(value, Mapping):
                value = {**manifest.get(key, {}), **value}
            manifest[key] = value
        write_json(path, manifest)


def discard(path: Path) -> None:
    """Removes a folder so that it never looks half there: renamed first, then deleted."""
    if path.exists():
        path.rename(path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.discarded"))
    # A process that was killed between the two has left its own behind.
    for doomed in path.parent.glob(f".{glob.escape(path.name)}.*.discarded"):
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def _holds_other_things(path: Path) -> bool:
    """True for a file, and for a folder with more in it than the hidden files of a process killed while starting."""
    return path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()))


def _other_identity(stage: Stage, known: Mapping[str, Any]) -> UserError:
    before = flatten({"settings": known["settings"], "parents": known["parents"]})
    after = flatten({"settings": stage.settings, "parents": stage.parents})
    changed = [
        f"{key.partition('.')[2]}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    return UserError(
        f"{stage.path} was made with other settings",
        got="; ".join(changed),
        fix="--overwrite replaces it (and what was made from it), or another --name or --run keeps both",
    )


# ------------------------------------------------------------------ the lease


class _Lease:
    """RUN/.lease: who holds the directory, renewed by a heartbeat.

    A holder on this machine whose process is gone is dead at once; one elsewhere is dead when its heartbeat is older
    than LEASE_SECONDS. Contenders take turns by a file lock; on mounts without locks the last one to write holds it.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / ".lease"
        self.token = f"{_machine()}:{os.getpid()}:{time.time_ns()}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sslscale-lease", daemon=True)

    def acquire(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            with _turn(self.run / _LOCK):
                holder = self._holder()
                if holder is not None and _alive(holder):
                    raise _in_use(self.run, holder)
                self._write()
        except OSError as error:
            raise UserError(
                "the run directory cannot be written",
                got=f"{self.run}: {error.strerror or error}",
                fix="give another --run",
            ) from None
        time.sleep(_SETTLE_SECONDS)
        if not self._held():
            raise _in_use(self.run, self._holder())
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._held():
                self.path.unlink()
                if [entry.name for entry in self.run.iterdir()] == [_LOCK]:  # nothing was started
                    (self.run / _LOCK).unlink()
                    self.run.rmdir()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk must not end the work; the lease then runs out
                if not self._held():
                    print(f"error: {_in_use(self.run, self._holder())}", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                self._write()

    def _held(self) -> bool:
        holder = self._holder()
        return holder is not None and holder["token"] == self.token

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _write(self) -> None:
        process = {"machine": _machine(), "pid": os.getpid(), "start": _start_time(os.getpid())}
        write_json(self.path, {"token": self.token, **process, "time": time.time()})


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a mount without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _alive(holder: Mapping[str, Any]) -> bool:
    if holder["machine"] != _machine():
        return time.time() - holder["time"] < LEASE_SECONDS
    start = _start_time(holder["pid"])
    return start is not None and abs(start - holder["start"]) < _START_TOLERANCE_SECONDS


def _in_use(run: Path, holder: Mapping[str, Any] | None) -> UserError:
    who = f"pid {holder['pid']} on {holder['machine'].partition(' ')[0]}" if holder else "another process"
    return UserError(
        "the run directory is in use by another process",
        got=f"{run} is held by {who}",
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
