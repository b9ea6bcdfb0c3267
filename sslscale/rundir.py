"""One run's folder: manifest, stages with their identity, part markers, failures, metrics and the lease.

RUN/manifest.json                   who made it: command, versions, hardware, seeds, what each stage counted
RUN/config.yaml                     resolved
RUN/.lease/<number>                 the process that holds the directory, with a heartbeat; the highest number counts
RUN/<kind>[/<name>]/stage.json      the stage's identity, its settings and its parents, and the command that began it;
                                    written first
RUN/<kind>[/<name>]/done/<part>     a marker per finished part (its content is the part's own result)
RUN/<kind>[/<name>]/failed/<part>.jsonl   what was lost, with the key and the reason
RUN/<kind>[/<name>]/result.json     written last: whatever has none is not done

RUN may be a URL: then `path` is its working copy, and `sslscale.storage` publishes each file as it is written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sslscale import storage
from sslscale.errors import StageError, UserError
from sslscale.lease import Lease, lost
from sslscale.storage import write_atomic

FORMAT_VERSION = 1
NAMED = ("dedup", "index", "cluster", "anomaly", "reduce")
"""Stages of which a run may hold several, each under a name of its own."""
MAIN = "main"
"""The name of an answer that is given none."""
_OTHER_PLACE = {".pack": "another pack.output", **dict.fromkeys(("pretrain", "embed", "projection"), "another --run")}
_PUBLISH_SECONDS = 15.0
_PUBLISH_BYTES_A_SECOND = 1e6


# ------------------------------------------------------------------ small files


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; a UserError where it is missing or broken."""
    try:
        return json.loads(storage.bring(path).read_text())
    except FileNotFoundError:
        raise UserError("a file that this needs is missing", got=storage.shown(path)) from None
    except json.JSONDecodeError as error:
        raise UserError("a file is not valid JSON", got=f"{path}: {error}") from None


def read_lines(path: Path) -> list[Any]:
    """The whole lines of a file of JSON lines, which another process may be adding to; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]


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


def check_name(name: str) -> str:
    """`name`, of an answer; UserError where it could not be the name of one folder that `status` finds."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise UserError(
            "this cannot be the name of an answer",
            got=repr(name),
            allowed="letters, digits, '.', '_' and '-', of which '.' is not the first",
            fix="give --name another",
        )
    return name


# ------------------------------------------------------------------ a stage


class Stage:
    """One stage's folder. Made by `RunDir.open_stage`; `done` says whether there is nothing left to do."""

    def __init__(
        self, path: Path, kind: str, name: str | None, settings: Mapping[str, Any], parents: Mapping[str, str]
    ):
        self.path, self.kind, self.name = path, kind, name
        self.settings, self.parents = dict(settings), dict(parents)
        self.identity = hash_json({"settings": self.settings, "parents": self.parents})
        self._retries = storage.retries()

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
            storage.remove(file)  # of an earlier attempt that was killed before its marker
        write_json(self.path / "done" / part, dict(record))

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes result.json, last, with the requests to a store that had to be sent again. Returns it as read back."""
        record = {"format_version": FORMAT_VERSION, "identity": self.identity, **result}
        write_json(self.path / "result.json", {**record, "storage_retries": storage.retries() - self._retries})
        return self.result

    def check_failed_share(self, failed: int, total: int, allowed: float) -> None:
        """Raises StageError (exit 1) when more than `allowed` of the samples failed."""
        if total and failed / total > allowed:
            raise StageError(
                f"{self.kind}: too many samples failed",
                got=f"{failed} of {total} ({failed / total:.2%})",
                allowed=f"at most {allowed:.2%} ({self.kind}.max_failed_share)",
                fix=f"read the reasons in {storage.shown(self.path)}/failed, or raise {self.kind}.max_failed_share",
            )


class Metrics:
    """metrics.jsonl: one JSON object a line, appended. A line cut off by a crash is dropped on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = 0
        self._file: tuple[int, int] | None = None  # the one that `_seen` bytes of were read
        self._published = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        if storage.bring(path).is_file() and not path.read_bytes().endswith(b"\n"):
            kept = path.read_bytes().rpartition(b"\n")
            write_atomic(path, kept[0] + kept[1])

    def append(self, **values: Any) -> None:
        """Adds a line; a store gets the whole file again now and then, the more rarely the longer it is."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
            size = file.tell()
        if time.monotonic() - self._published > _PUBLISH_SECONDS + size / _PUBLISH_BYTES_A_SECOND:
            self.publish()

    def publish(self) -> None:
        self._published = time.monotonic()
        storage.publish(self.path)

    def read(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    def read_new(self) -> list[dict[str, Any]]:
        """The whole lines that were added since the last call, for a reader beside the writer.

        All of them where a restart has dropped some: the places of the others in the file may have changed.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != self._file:
                self._file, self._seen = (status.st_dev, status.st_ino), 0
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
    """A run directory, held by this process while it is open (`with RunDir(path) as run`).

    `location` is a path or an fsspec URL; `path` is where it is worked on. What begins in a run that is `part_of`
    another begins in that one too.
    """

    def __init__(self, location: str | Path, part_of: RunDir | None = None) -> None:
        self.path = storage.local_path(location)
        self.on_start: Callable[[Path], Mapping[str, Any]] = part_of.on_start if part_of else lambda folder: {}
        """Called with the folder of a stage that is accepted and not done: from then on this command changes the run.

        What it returns, such as the command, is kept in the stage.json of a stage that is new.
        """
        self._lease: Lease | None = None
        self._begun: list[Path] = []

    @classmethod
    def reading(cls, location: str | Path) -> RunDir:
        """The run as it is now, for who does not hold it.

        A URL has a working copy of its own for readers: in the other one may lie what a process at work on this machine
        has not published yet.
        """
        run = cls(location)
        run.path = storage.local_path(location, "reading")
        return run.pull()

    def __enter__(self) -> RunDir:
        self._lease = Lease(self.path)
        self._lease.acquire()
        return self.pull()

    def pull(self) -> RunDir:
        """Brings the working copy up to date, as holding the directory does; see `reading` for who does not."""
        storage.pull(self.path)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        assert self._lease is not None
        if isinstance(error, UserError) and not lost():
            self._withdraw()
        self._lease.release()

    def _withdraw(self) -> None:
        """Removes stages begun here that have made nothing: the settings that were refused bind no others."""
        for path in self._begun:
            if path.is_dir() and [entry.name for entry in path.iterdir()] == ["stage.json"]:
                discard(path)

    def stage_path(self, kind: str, name: str | None = None) -> Path:
        return self.path / kind / name if name else self.path / kind

    def stages(self) -> list[Path]:
        """The folder of every stage that was begun, in this run and in the runs inside it, in no order."""
        roots = [self.path, self.path / "thumbnails", *self.path.glob("baselines/*")]
        records = [file for root in roots for depth in ("*", "*/*") for file in root.glob(f"{depth}/stage.json")]
        folders = [file.parent for file in records]  # without what is being thrown away
        return [one for one in folders if not any(part.startswith(".") for part in one.relative_to(self.path).parts)]

    def answers(self) -> set[str]:
        """The names of finished answers; main too where training or embedding, which have no name, were begun."""
        kinds = {one: one.relative_to(self.path).parts[0] for one in self.stages()}
        named = {one.name for one, kind in kinds.items() if kind in NAMED and (one / "result.json").is_file()}
        return named | {MAIN} if set(kinds.values()) - set(NAMED) else named

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
                    self.on_start(stage.path)
                return stage
            if not overwrite:
                raise _other_identity(stage, known)
        if _holds_other_things(stage.path) and not overwrite:
            raise UserError(
                f"{storage.shown(stage.path)} holds something else than a stage",
                fix=f"--overwrite throws it away, or choose {_other_place(kind)}",
            )
        discard(stage.path)
        begun_by = self.on_start(stage.path)
        write_json(
            record,
            {
                "format_version": FORMAT_VERSION,
                "identity": stage.identity,
                "settings": stage.settings,
                "parents": stage.parents,
                **begun_by,
            },
        )
        self._begun.append(stage.path)
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
    """Removes a folder, here and there, so that it never looks half there: renamed first, then deleted."""
    if path.exists():
        path.rename(path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.discarded"))
    # A process that was killed between the two has left its own behind.
    for doomed in path.parent.glob(f".{glob.escape(path.name)}.*.discarded"):
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    storage.remove_remote_tree(path)


def _holds_other_things(path: Path) -> bool:
    """True for a file, and for a folder with more in it than the hidden files of a process killed while starting."""
    return path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()))


def _other_place(kind: str) -> str:
    """Where a stage could lie beside one of the same kind."""
    return _OTHER_PLACE.get(kind, "another --name or --run")


def _other_identity(stage: Stage, known: Mapping[str, Any]) -> UserError:
    before = flatten({"settings": known["settings"], "parents": known["parents"]})
    after = flatten({"settings": stage.settings, "parents": stage.parents})
    changed = [
        f"{key.partition('.')[2]}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    return UserError(
        f"{storage.shown(stage.path)} was made with other settings",
        got="; ".join(changed),
        fix=f"--overwrite replaces it (and what was made from it), or {_other_place(stage.kind)} keeps both",
    )
