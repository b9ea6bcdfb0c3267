"""What a checkpoint is: a folder that the run's own list names. Whatever the list does not name does not exist.

pretrain/checkpoints/step-00000120/deepspeed/   DeepSpeed's sharded state
                                  /universal/   the same for any number of ranks, made when it is needed
                                  /slow.pt      the objective's slow state
                                  /backbone/    the exported backbone
                                  /objective/   the exported heads
pretrain/checkpoints.json                       the list, written last: step, cursors, counters, world size

In a run at a URL a checkpoint is uploaded beside the training, and named once its files are up.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sslscale import storage
from sslscale.config import PretrainConfig
from sslscale.errors import StageError
from sslscale.models.export import export_backbone
from sslscale.objectives.export import WEIGHTS, export_objective
from sslscale.pretrain.engine import SHARDED, UNIVERSAL, Engine, make_universal, write_tensors
from sslscale.pretrain.ranks import not_written
from sslscale.pretrain.upload import Upload, fetch
from sslscale.rundir import FORMAT_VERSION, discard, read_json, write_json
from sslscale.shards.plan import Cursor


@dataclass
class TrainState:
    """Where training stands, independent of the world size."""

    step: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)
    samples: int = 0
    bad_steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    unhealthy_evaluations: int = 0
    """In a row, up to now."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cursors": {str(s): [c.epoch, c.position] for s, c in sorted(self.cursors.items())}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainState:
        cursors = {int(s): Cursor(*c) for s, c in value["cursors"].items()}
        return cls(**{**value, "cursors": cursors})


class Checkpoints:
    """The run's list of checkpoints: the newest `keep`, and each at a multiple of `keep_every` steps (0: none)."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.list_path = folder / "checkpoints.json"
        self._upload: Upload | None = None

    def entries(self) -> list[dict[str, Any]]:
        return read_json(self.list_path)["checkpoints"] if storage.refresh(self.list_path).is_file() else []

    def save(self, engine: Engine, state: TrainState, size: int) -> None:
        """Every rank calls it. The list is written by rank 0 once all ranks' files are on disk, and up: see `settle`.

        Raises StageError on every rank where one could not write; what the list names is as it was.
        """
        self.settle()
        name = self._free_name(f"step-{state.step:08d}")
        folder = self.folder / "checkpoints" / name
        self._raise_together(self._make(folder), folder)
        self._raise_together(self._write(engine, folder, size), folder)
        world = {"world_size": engine.world_size, "zero_stage": engine.zero_stage}
        entry = {"name": name, **world, "state": state.to_json()}
        self._upload = Upload(folder, lambda: self._commit(entry))
        dist.barrier()

    def _free_name(self, name: str) -> str:
        """One that the list has not: a step may be saved again, and what was saved first is not lost meanwhile."""
        free: list[str] = []
        if dist.get_rank() == 0:
            taken = {entry["name"] for entry in self.entries()}
            names = (f"{name}-{again}" if again else name for again in itertools.count())
            free = [next(one for one in names if one not in taken)]
        shared: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(shared, free)
        return shared[0][0]

    def settle(self) -> None:
        """Waits until this rank's part of the last checkpoint is up, and, on rank 0, until it is named."""
        if self._upload is not None:
            self._upload.settle()

    @staticmethod
    def _make(folder: Path) -> Exception | None:
        """The folders, empty, made by rank 0: DeepSpeed would fail to make them on one rank alone."""
        if dist.get_rank() == 0:
            try:
                discard(folder)  # left by a save that never reached the list
                (folder / SHARDED).mkdir(parents=True)
            except OSError as error:
                return error
        return None

    @staticmethod
    def _write(engine: Engine, folder: Path, size: int) -> Exception | None:
        """This rank's files, on disk when it returns; what kept it from writing them, where something did."""
        failure = engine.save(folder)
        state = engine.whole_state()
        if dist.get_rank() != 0 or failure is not None:
            return failure
        backbone, model = engine.objective.backbone, "backbone.model."
        weights = {name.removeprefix(model): value for name, value in state.items() if name.startswith(model)}
        config = engine.config
        try:
            write_tensors(engine.objective.slow_state(), folder / "slow.pt")
            sha256 = export_backbone(backbone, weights, folder / "backbone", size=size)
            export_objective(engine.objective, config.views, state, folder / "objective", backbone=sha256)
            _sync(folder / "backbone" / "backbone.safetensors")
            _sync(folder / "objective" / WEIGHTS)
        except Exception as error:  # the other ranks wait to hear of it
            return error
        return None

    @staticmethod
    def _raise_together(failure: Exception | None, folder: Path) -> None:
        """Throws away what the ranks have written where one of them failed: it may be what fills the disk."""
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if failure is None else str(failure))
        first = next(filter(None, failures), None)
        if first is None:
            return
        error = not_written(first, folder)
        if dist.get_rank() == 0:
            discard(folder)
        dist.barrier()
        raise error

    def _commit(self, entry: dict[str, Any]) -> None:
        """Names a checkpoint whose files are all there, then removes those that are named no more."""
        others = [known for known in self.entries() if known["state"]["step"] != entry["state"]["step"]]
        kept = self._kept([*others, entry])
        try:
            write_json(self.list_path, {"format_version": FORMAT_VERSION, "checkpoints": kept})
        except OSError:  # a full disk: what nothing names only fills it more
            discard(self.folder / "checkpoints" / entry["name"])
            raise
        named = {entry["name"] for entry in kept}
        for name in storage.names(self.folder / "checkpoints"):
            if name not in named:
                discard(self.folder / "checkpoints" / name)

    def _kept(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The newest, those kept for ever, and the last healthy one before the newest where none of them is."""
        newest, older = entries[-self.keep :], entries[: -self.keep]
        healthy = [] if any(map(_healthy, newest)) else [entry for entry in older if _healthy(entry)][-1:]
        lasting = [entry for entry in older if self.keep_every and entry["state"]["step"] % self.keep_every == 0]
        return [*(entry for entry in older if entry in healthy or entry in lasting), *newest]

    def last_healthy(self) -> Path | None:
        """The newest checkpoint whose last evaluation found the features healthy."""
        names = [entry["name"] for entry in self.entries() if _healthy(entry)]
        return self.folder / "checkpoints" / names[-1] if names else None

    def resized(self, config: PretrainConfig) -> bool:
        """Whether the newest checkpoint is of another number of ranks, in a form that depends on it (ZeRO 1 to 3)."""
        entries = self.entries()
        return bool(entries) and config.zero_stage > 0 and entries[-1]["world_size"] != dist.get_world_size()

    def load_last(self, engine: Engine) -> TrainState | None:
        """Restores the newest checkpoint into the engine and its objective; None where there is none.

        Where the world size has changed, the engine was made with `universal` and gets DeepSpeed's universal form.
        """
        entries = self.entries()
        if not entries:
            return None
        folder = self.folder / "checkpoints" / entries[-1]["name"]
        fetch(folder)
        if self.resized(engine.config):
            self._check_resizable(engine, entries[-1])
            if dist.get_rank() == 0:
                discard(folder / UNIVERSAL)
                make_universal(folder)
                storage.publish_tree(folder / UNIVERSAL)
            dist.barrier()
            fetch(folder / UNIVERSAL)
        engine.load(folder)
        slow = torch.load(folder / "slow.pt", map_location=engine.device, weights_only=True)
        engine.objective.load_slow_state(slow)
        return TrainState.from_json(entries[-1]["state"])

    @staticmethod
    def _check_resizable(engine: Engine, entry: dict[str, Any]) -> None:
        if engine.config.optimizer.name != "adamw":
            raise StageError(
                "pretrain: DeepSpeed carries only AdamW's state over to another number of ranks",
                got=f"{entry['world_size']} ranks then, {engine.world_size} now, {engine.config.optimizer.name}",
                fix=f"run with pretrain.num_workers={entry['world_size']} (a run begun with zero_stage 0 takes any)",
            )


def _healthy(entry: dict[str, Any]) -> bool:
    return TrainState.from_json(entry["state"]).unhealthy_evaluations == 0


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
