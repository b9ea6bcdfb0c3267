"""What a checkpoint is: a folder that the run's own list names. Whatever the list does not name does not exist.

pretrain/checkpoints/step-00000120/deepspeed/   DeepSpeed's sharded state
                                  /universal/   the same for any number of ranks, made when it is needed
                                  /slow.pt      the objective's slow state
                                  /backbone/    the exported backbone
pretrain/checkpoints.json                       the list, written last: step, cursors, counters, world size
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sslscale.config import PretrainConfig
from sslscale.errors import StageError
from sslscale.models.image import export_backbone
from sslscale.pretrain.engine import UNIVERSAL, Engine, make_universal
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
    """The run's list of checkpoints."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.list_path = folder / "checkpoints.json"

    def entries(self) -> list[dict[str, Any]]:
        return read_json(self.list_path)["checkpoints"] if self.list_path.is_file() else []

    def save(self, engine: Engine, state: TrainState, size: int) -> None:
        """Every rank calls it. The list is written by rank 0 once all ranks' files are on disk."""
        name = f"step-{state.step:08d}"
        folder = self.folder / "checkpoints" / name
        if dist.get_rank() == 0:
            discard(folder)  # left by a save that never reached the list
            folder.mkdir(parents=True)
        dist.barrier()
        engine.save(folder)
        weights = engine.backbone_state()
        if dist.get_rank() == 0:
            torch.save(engine.objective.slow_state(), folder / "slow.pt")
            backbone = engine.objective.backbone
            export_backbone(backbone.config, weights, folder / "backbone", feature_dim=backbone.feature_dim, size=size)
            for file in folder.rglob("*"):
                if file.is_file():
                    _sync(file)
        dist.barrier()
        if dist.get_rank() == 0:
            entry = {
                "name": name,
                "world_size": engine.world_size,
                "zero_stage": engine.zero_stage,
                "state": state.to_json(),
            }
            kept = self._kept([*self.entries(), entry])
            write_json(self.list_path, {"format_version": FORMAT_VERSION, "checkpoints": kept})
            named = {entry["name"] for entry in kept}
            for path in (self.folder / "checkpoints").iterdir():
                if path.name not in named:
                    discard(path)
        dist.barrier()

    def _kept(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The newest, and the last healthy one before them where none of them is."""
        newest, older = entries[-self.keep :], entries[: -self.keep]
        healthy = [] if any(map(_healthy, newest)) else [entry for entry in older if _healthy(entry)][-1:]
        return [*healthy, *newest]

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
        if self.resized(engine.config):
            self._check_resizable(engine, entries[-1])
            if dist.get_rank() == 0:
                discard(folder / UNIVERSAL)
                make_universal(folder)
            dist.barrier()
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
                fix=f"run with pretrain.num_workers={entry['world_size']}, or with zero_stage 0",
            )


def _healthy(entry: dict[str, Any]) -> bool:
    return TrainState.from_json(entry["state"]).unhealthy_evaluations == 0


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
