"""The training loop of one rank. The same on a laptop and on a cluster: it sees torch.distributed and files.

open the shards -> build the objective and its engine -> go on from the last checkpoint
repeat:
    read this rank's share of the next global batch -> make its views -> engine step -> objective.after_step
    now and then: log, evaluate without labels, checkpoint and export the backbone
finish: final evaluation, checkpoint, RUN/pretrain/backbone
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sslscale.config import PretrainConfig, RunConfig
from sslscale.errors import StageError
from sslscale.models.image import Backbone, copy_backbone
from sslscale.models.initial import load_weights
from sslscale.objectives import build_objective
from sslscale.pretrain.checkpoint import Checkpoints, TrainState
from sslscale.pretrain.engine import Engine
from sslscale.pretrain.evaluate import Evaluator, is_healthy
from sslscale.pretrain.launch import STOP
from sslscale.rundir import Metrics, write_atomic
from sslscale.shards.dataset import open_shards
from sslscale.shards.decode import decode_image
from sslscale.shards.loader import RawBatch, TrainLoader
from sslscale.views.base import Batch
from sslscale.views.image import to_float
from sslscale.views.keyed import KeyedRandom

FAILED = "failed/samples.jsonl"


@dataclass(frozen=True)
class RankResult:
    """What rank 0 reports once training is over (or was asked to stop)."""

    finished: bool
    result: dict[str, Any]


def pick_device(name: str) -> torch.device:
    """The device of a config's `device`: auto takes CUDA where there is one."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StageError(
            "device=cuda was asked for and torch sees no CUDA device", fix="run `sslscale doctor`, or device=cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def initial_backbone(config: PretrainConfig) -> Backbone:
    """The backbone that training starts from, at random weights or at those of `init_from`."""
    backbone = Backbone(config.backbone)
    if config.init_from is not None:
        load_weights(backbone, config.init_from)
    if config.freeze_backbone:
        backbone.freeze()
    return backbone


class Trainer:
    """One rank of a pretraining run. torch.distributed is initialised by whoever launched this process."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        assert config.pretrain is not None
        self.folder, self.run_config, self.config = folder, config, config.pretrain
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = pick_device(self.config.device)
        torch.set_num_threads(self.config.threads)
        cache = folder.parent / "cache" / self.config.dataset
        self.shards = open_shards(config.datasets[self.config.dataset], cache=cache, limit=config.limit)
        self.total_steps = self._total_steps()
        self.size = self.config.load_size or self.config.views.size
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        backbone = initial_backbone(self.config)
        objective = build_objective(self.config.objective, backbone, self.config.views).to(self.device)
        self.objective = objective
        self.checkpoints = Checkpoints(folder, self.config.keep_checkpoints)
        resized = self.checkpoints.resized(self.config)
        self.engine = Engine(objective, self.config, self.total_steps, self.device, universal=resized)
        self.state = self.checkpoints.load_last(self.engine) or TrainState()
        self.metrics = Metrics(folder / "metrics.jsonl") if self.rank == 0 else None
        self.evaluator = Evaluator(config, self.shards, self.device)
        self.failures = self._read_failures() if self.state.step else {}
        self.restarted_at = self.state.step

    def _total_steps(self) -> int:
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return max(1, math.ceil(self.config.epochs * self.shards.num_samples / self.config.global_batch))

    def train(self) -> RankResult:
        """Runs to the last step, or to the step at which a stop was asked for."""
        if self.metrics is not None:
            self.metrics.keep(lambda line: line["step"] <= self.state.step)
        board = self._tensorboard()
        stop = False
        cursors = self.state.cursors
        with self._loader(cursors) as loader:
            batches = iter(loader)
            while self.state.step < self.total_steps and not stop:
                begin = time.perf_counter()
                waited = loader.wait_seconds
                raw = next(batches)
                wait = loader.wait_seconds - waited
                stop_asked = self.rank == 0 and (self.folder / STOP).exists()
                outcome = self.engine.step(self._micro_batches(raw), self.state.step, stop=stop_asked)
                if outcome.applied:
                    self.objective.after_step((self.state.step + 1) / self.total_steps)
                stop = outcome.stop
                self._advance(raw, time.perf_counter() - begin, wait)
                self._log(outcome.metrics, board)
                if self._due(self.config.evaluate_every) or self._due(self.config.checkpoint_every):
                    self._evaluate(board)
                if stop or self._due(self.config.checkpoint_every):
                    self._checkpoint()
        if self.state.step < self.total_steps:
            return RankResult(finished=False, result={})
        return self._finish(board)

    def _loader(self, cursors: dict[int, Any]) -> TrainLoader:
        config = self.config
        decode = functools.partial(decode_image, channels=config.backbone.channels, size=self.size)
        return TrainLoader(
            self.shards,
            rank=self.rank,
            world_size=self.world_size,
            num_streams=config.num_streams,
            global_batch=config.global_batch,
            seed=self.run_config.seed,
            shuffle_block=config.shuffle_block,
            cursors=[cursors[s] for s in range(config.num_streams)] if cursors else None,
            decode=decode,
            decode_threads=config.decode_threads,
            prefetch=config.prefetch,
        )

    def _micro_batches(self, raw: RawBatch) -> list[Batch]:
        """Views of this rank's samples, cut into the passes of one step."""
        size = self.engine.micro_batch
        batches = []
        for start in range(0, len(raw.ids), size):
            part = slice(start, start + size)
            images = to_float(raw.images[part].to(self.device, non_blocking=True))
            ids, epochs = raw.ids[part].to(self.device), raw.epochs[part].to(self.device)
            random = KeyedRandom.of(self.run_config.seed, epochs, ids)
            with torch.no_grad():
                views = self.objective.views(images, random.fold("views"))
            batches.append(Batch(views, random.fold("objective")))
        return batches

    def _advance(self, raw: RawBatch, seconds: float, wait: float) -> None:
        state = self.state
        state.step += 1
        state.samples += self.config.global_batch
        state.seconds += seconds
        state.wait_seconds += wait
        state.cursors.update(raw.cursors)
        state.bad_steps = self.engine.bad_steps
        for failure in raw.failures:
            shard = self.shards.shards[failure.shard].name
            record = {"key": failure.key, "shard": shard, "record": failure.record, "reason": failure.reason}
            self.failures[shard, failure.record] = record

    def _read_failures(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What was found unreadable before the checkpoint that this run goes on from: (shard, record) -> its line."""
        path = self.folder / FAILED
        lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
        return {(line["shard"], line["record"]): line for line in lines}

    def _due(self, every: int) -> bool:
        return bool(every) and self.state.step % every == 0 and self.state.step < self.total_steps

    def _log(self, metrics: dict[str, float], board: Any) -> None:
        step = self.state.step
        if self.metrics is None or (step % self.config.log_every and step < self.total_steps):
            return
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        line["samples_per_second"] = self.state.samples / self.state.seconds
        line["data_wait_share"] = self.state.wait_seconds / self.state.seconds
        self._write(line, board, "train")

    def _evaluate(self, board: Any) -> dict[str, float]:
        measured = self.evaluator.evaluate(self.objective)
        healthy = self.config.collapse is None or is_healthy(measured, self.config.collapse)
        self.state.unhealthy_evaluations = 0 if healthy else self.state.unhealthy_evaluations + 1
        if self.metrics is not None:
            self._write({"step": self.state.step, **{f"eval_{k}": v for k, v in measured.items()}}, board, "eval")
        self._stop_if_collapsed(measured)
        return measured

    def _stop_if_collapsed(self, measured: dict[str, float]) -> None:
        guard, unhealthy = self.config.collapse, self.state.unhealthy_evaluations
        if guard is None or unhealthy < guard.evaluations:
            return
        last = self.checkpoints.last_healthy()
        raise StageError(
            f"pretrain: the features have collapsed: unhealthy at {unhealthy} evaluations in a row",
            got=f"feature_std {measured['feature_std']:.4g}, rankme {measured['rankme']:.4g} at step {self.state.step}",
            allowed=f"feature_std >= {guard.min_feature_std}, rankme >= {guard.min_rankme} (pretrain.collapse)",
            fix=f"another lr, batch or objective; the last healthy checkpoint is {last or 'none: there was none yet'}",
        )

    def _write(self, line: dict[str, Any], board: Any, group: str) -> None:
        assert self.metrics is not None
        self.metrics.append(**line, total_steps=self.total_steps)
        for name, value in line.items():
            if name != "step" and value is not None:
                board.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, line["step"])

    def _tensorboard(self) -> Any:
        if self.rank != 0:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.state.step)

    def _checkpoint(self) -> None:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (self.state.cursors, self.failures))
        for cursors, failures in gathered:
            self.state.cursors.update({s: c for s, c in cursors.items() if self._newer(s, c)})
            self.failures.update(failures)
        if self.rank == 0 and self.failures:
            lines = [json.dumps(self.failures[sample]) for sample in sorted(self.failures)]
            write_atomic(self.folder / FAILED, "\n".join(lines) + "\n")
        self.checkpoints.save(self.engine, self.state, self.config.views.size)

    def _newer(self, stream: int, cursor: Any) -> bool:
        known = self.state.cursors.get(stream)
        return known is None or (cursor.epoch, cursor.position) > (known.epoch, known.position)

    def _versions(self) -> dict[str, str]:
        """What this rank really runs; Ray's only where Ray started it."""
        started_by = {"ray": sys.modules["ray"].__version__} if "ray" in sys.modules else {}
        return {**self.engine.versions, **started_by}

    def _finish(self, board: Any) -> RankResult:
        measured = self._evaluate(board)
        self._checkpoint()
        share = len(self.failures) / self.shards.num_samples
        if share > self.config.max_failed_share:
            raise StageError(
                "pretrain: too many samples failed",
                got=f"{len(self.failures)} of {self.shards.num_samples} ({share:.2%})",
                allowed=f"at most {self.config.max_failed_share:.2%} (pretrain.max_failed_share)",
                fix=f"read the reasons in {self.folder / 'failed'}",
            )
        if self.rank == 0:
            board.close()
            last = self.checkpoints.entries()[-1]["name"]
            copy_backbone(self.folder / "checkpoints" / last / "backbone", self.folder / "backbone")
        dist.barrier()
        state = self.state
        result = {
            "world_size": self.world_size,
            "zero_stage": self.engine.zero_stage,
            "backend": dist.get_backend(),
            "device": str(self.device),
            "versions": self._versions(),
            "objective": self.config.objective,
            "steps": state.step,
            "samples": state.samples,
            "epochs": state.samples / self.shards.num_samples,
            "bad_steps": state.bad_steps,
            "failed": len(self.failures),
            "resumed_at_step": self.restarted_at,
            "seconds": state.seconds,
            "samples_per_second": state.samples / state.seconds,
            "data_wait_share": state.wait_seconds / state.seconds,
            "num_parameters": sum(p.numel() for p in self.objective.parameters()),
            "measures": measured,
            "healthy": state.unhealthy_evaluations == 0,
        }
        return RankResult(finished=True, result=result)
