"""A table of many long runs, made over several sittings: a line of JSON a run, and the process that makes it.

A line names its row (`dataset`, `recipe`, `seed` ...), has the hash of what it depends on (`config`) and the commit
that made it, and holds what was measured, or what the run said when it `failed`; then it is tried again at the next
start. Lines of other recipes, or of another CODE, stay in the file and do not count.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sslscale.config import load_config
from sslscale.errors import EXIT_SIGTERM
from sslscale.provenance import provenance
from sslscale.rundir import hash_json, read_lines
from sslscale.runtime.device import multiplies_bf16, pick_device
from sslscale.storage import write_atomic

CODE = 1
"""Part of every line's hash: raised when views, objectives, training or measures compute something else from the same
config, so that what was measured before is measured again.
"""
OVER_BUDGET = 1.1  # of a row's budget, above which the table says so
_STOPPING_SECONDS = 120  # that a run has to save and end
_TAIL = 1500  # characters of what a failed run said

# The process asks to be sent SIGTERM when its parent ends, however that ends, before it becomes the command.
_BOUND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which exec keeps
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class RunFailed(Exception):
    """A run ended badly; the message is its exit status and the tail of what it said."""


def run_verb(verb: str, config: Path, run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """`sslscale VERB` with a config, in a process of its own: its result (`run`: of each stage). Raises RunFailed."""
    command = [sys.executable, "-m", "sslscale.cli", verb, "-c", str(config), "--run", str(run), "--json"]
    return json.loads(output_of([*command, *overrides]).splitlines()[-1])


def output_of(command: Sequence[str]) -> str:
    """What the command, an executable's path first, writes to stdout. Raises RunFailed.

    Its process does not outlive this one: where this one ends, or is interrupted, it is told to save and end.
    """
    bound = [sys.executable, "-c", _BOUND, str(os.getpid()), *command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(bound, stdout=out, stderr=err)
        try:
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip())
    if status:
        raise RunFailed(f"exit {status}: {texts[1][-_TAIL:]}")
    return texts[0]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOPPING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def exit_on_sigterm() -> None:
    """SIGTERM ends this process as an error does, so that its run is stopped and temporary folders are removed."""

    def end(number: int, frame: Any) -> NoReturn:
        sys.exit(EXIT_SIGTERM)

    signal.signal(signal.SIGTERM, end)


def recipe_hash(config: Path, *more: Any) -> str:
    """Of what a config and its base say, of CODE, and of whatever else the row depends on (JSON values).

    `precision: auto` counts as what it is here, so that no table has rows in bf16 beside rows in fp32.
    """
    recipe = yaml.safe_load(config.read_text())
    base = yaml.safe_load((config.parent / recipe["base"]).read_text()) if "base" in recipe else None
    for said in (recipe, base or {}):
        if said.get("pretrain", {}).get("precision") == "auto":
            said["pretrain"]["precision"] = "bf16" if multiplies_bf16(pick_device("auto")) else "fp32"
    return hash_json([CODE, recipe, base, *more])


def without_training(config: Path, features: str) -> list[str]:
    """Overrides for `pixels` or `hog` in place of a trained backbone, as the baselines of a run are embedded."""
    trained = load_config(str(config)).pretrain
    assert trained is not None
    images = [f"embed.channels={trained.backbone.channels}", f"embed.size={trained.backbone.input_size(trained.views)}"]
    return ["pretrain=null", f"embed.backbone={features}", "embed.normalize=false", *images]


def against_labels(measures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """What a table has of a clustering's `measures` with labels."""
    return {f"{prefix}{name}": measures[name] for name in ("acc", "nmi", "ari")}


class Runs:
    """The lines in a file, or in memory only where `path` is None."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = [] if path is None else read_lines(path)
        self._commit = provenance()["git_commit"]

    def find(self, key: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
        """The line of the row `key` with this hash."""
        return next((line for line in self.lines if line["config"] == digest and key.items() <= line.items()), None)

    def done(self, key: Mapping[str, Any], digest: str) -> bool:
        line = self.find(key, digest)
        return line is not None and "failed" not in line

    def attempt(
        self, key: Mapping[str, Any], digest: str, measure: Callable[[], dict[str, Any]], *, again: bool = False
    ) -> None:
        """Measures a row that is not done, or `again` one that is, and writes down what was found or how it failed."""
        if self.done(key, digest) and not again:
            return
        print(f"... {_named(key)}", file=sys.stderr)
        try:
            found = measure()
        except RunFailed as error:
            found = {"failed": str(error)}
        line = {**key, "config": digest, "commit": self._commit, **found}
        print(
            {name: value[-_TAIL:] if isinstance(value, str) else value for name, value in line.items()}, file=sys.stderr
        )
        if self.path is not None:
            self.lines = read_lines(self.path)  # with what another benchmark has written since
        before = self.find(key, digest)
        self.lines = [other for other in self.lines if other is not before] + [line]
        if self.path is not None:
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def measured(self, hashes: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
        """The lines that hold a measurement under the hash that their (dataset, recipe) has now."""
        current = [line for line in self.lines if hashes.get((line["dataset"], line["recipe"])) == line["config"]]
        if len(current) < len(self.lines):
            print(f"{len(self.lines) - len(current)} lines of other recipes or code do not count", file=sys.stderr)
        return [line for line in current if "failed" not in line]

    def missing(self, rows: Iterable[tuple[Mapping[str, Any], str]]) -> list[dict[str, Any]]:
        """Of the rows (key, hash) that a whole table has, those that are not done, and how they failed if they did."""
        found = [(key, self.find(key, digest)) for key, digest in rows]
        return [
            {**key, "failed": None if line is None else line["failed"]}
            for key, line in found
            if line is None or "failed" in line
        ]


def commits(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The revisions that made these lines."""
    return sorted({str(line["commit"]) for line in lines})


def show_missing(missing: Sequence[Mapping[str, Any]]) -> None:
    """Says which rows the table above lacks."""
    for key in missing:
        reason = (key["failed"] or "not run yet").splitlines()[-1]
        print(f"MISSING {_named({name: value for name, value in key.items() if name != 'failed'})}: {reason}")


def over_budget(share: float | None) -> str:
    """What a table says beside a row that took more than its budget."""
    return "  OVER BUDGET" if share is not None and share > OVER_BUDGET else ""


def _named(key: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in key.items())
