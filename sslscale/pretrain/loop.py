"""The training loop of one rank. The same on a laptop and on a cluster: it sees torch.distributed and files.

open the shards -> build the objective and its engine -> go on from the last checkpoint
repeat:
    at the steps that the objective declares: prepare it by passes over the corpus
    read this rank's share of the next global batch -> make its views -> engine step -> objective.after_step
    now and then: log, evaluate without labels, checkpoint and export the backbone
finish: final evaluation, checkpoint, RUN/pretrain/backbone
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sslscale import storage
from sslscale.config import PretrainConfig, RunConfig
from sslscale.errors import StageError
from sslscale.models.base import Encoder
from sslscale.models.collectives import connect_neighbours
from sslscale.models.export import build_backbone, copy_backbone
from sslscale.models.initial import load_weights
from sslscale.objectives import build_objective
from sslscale.objectives.base import Moment
from sslscale.objectives.export import copy_objective, load_heads
from sslscale.pretrain.checkpoint import Checkpoints, TrainState
from sslscale.pretrain.corpus import CorpusTools, TrainingCorpus
from sslscale.pretrain.engine import Engine
from sslscale.pretrain.evaluate import Evaluator, is_healthy, warnings_of
from sslscale.pretrain.ranks import MOVE, STOP
from sslscale.rundir import Metrics, write_atomic
from sslscale.runtime.allocator import keep_freed_memory
from sslscale.runtime.cores import keep_to_own_cores
from sslscale.runtime.device import pick_device
from sslscale.shards.cache import ShardCache
from sslscale.shards.dataset import open_shards
from sslscale.shards.loader import RawBatch, TrainLoader
from sslscale.shards.plan import Cursor
from sslscale.views.base import Batch, as_input
from sslscale.views.keyed import KeyedRandom

FAILED = "failed/samples.jsonl"
FITTED = "fitted"
"""The folder of what was made of the corpus for the backbone, before training."""


@dataclass(frozen=True)
class RankResult:
    """What rank 0 reports once training is over (or was asked to stop)."""

    finished: bool
    result: dict[str, Any]


def initial_backbone(config: PretrainConfig, folder: Path) -> Encoder:
    """The backbone that training in `folder` starts from, at random weights or at those of `init_from`."""
    backbone = build_backbone(config.backbone, storage.bring_tree(folder / FITTED))
    if config.init_from is not None:
        load_weights(backbone, config.init_from)
    if config.freeze_backbone:
        backbone.freeze()
    if config.activation_checkpointing:
        backbone.checkpoint_activations()
    return backbone


class Trainer:
    """One rank of a pretraining run. torch.distributed is initialised by whoever launched this process.

    `tools` computes what an objective asks of the whole corpus. `feed` is called before everything that takes long, for
    a watchdog; `notice` says that the ranks should save and stop, and is asked equally often on every rank.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        tools: CorpusTools,
        *,
        feed: Callable[[], None] = lambda: None,
        notice: Callable[[], bool] = lambda: False,
    ) -> None:
        assert config.pretrain is not None
        self.feed, self.notice = feed, notice
        feed()
        self.folder, self.run_config, self.config = folder, config, config.pretrain
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = pick_device(self.config.device)
        torch.set_num_threads(self.config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
            keep_to_own_cores(self.config.threads)
            connect_neighbours()
        self.shards = open_shards(config.datasets[self.config.dataset], ShardCache.of(config), config.limit)
        self.total_steps = self._total_steps()
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        backbone = initial_backbone(self.config, folder)
        objective = build_objective(self.config.objective, backbone, self.config.views)
        load_heads(objective, self.config.init_from)
        self.objective = objective.to(self.device)
        channels, input_size = self.config.backbone.channels, self.config.backbone.input_size(self.config.views)
        self.reader = backbone.reader(channels, self.config.load_size or input_size)
        self.corpus = TrainingCorpus(
            self.shards,
            objective,
            tools,
            reader=self.reader,
            decode_threads=self.config.decode_threads,
            device=self.device,
            threads=self.config.threads,
            seed=config.seed,
            feed=feed,
        )
        self.checkpoints = Checkpoints(folder, self.config.keep_checkpoints, self.config.keep_every)
        # at the very start, before there is an engine: it may set trained parameters
        prepared = 0.0 if self.checkpoints.entries() else self._prepare(0)
        resized = self.checkpoints.resized(self.config)
        self.engine = Engine(objective, self.config, self.total_steps, self.device, universal=resized)
        self.state = self.checkpoints.load_last(self.engine) or TrainState(seconds=prepared)
        self.engine.bad_steps = self.state.bad_steps
        self.metrics = Metrics(folder / "metrics.jsonl") if self.rank == 0 else None
        self.traced = Metrics(folder / "samples.jsonl") if self.rank == 0 and self.config.trace_samples else None
        self.evaluator = Evaluator(config, self.shards, backbone.reader(channels, input_size), self.device)
        self.failures = self._read_failures() if self.state.step else {}
        self.restarted_at = self.state.step

    def _total_steps(self) -> int:
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return max(1, math.ceil(self.config.epochs * self.shards.num_samples / self.config.global_batch))

    def train(self) -> RankResult:
        """Runs to the last step, or to the step at which a stop was asked for."""
        for log in filter(None, (self.metrics, self.traced)):
            log.keep(lambda line: line["step"] <= self.state.step)
        board = self._tensorboard()
        stop = False
        while self.state.step < self.total_steps and not stop:
            if self.state.step:
                self.state.seconds += self._prepare(self.state.step)
            stop = self._train_until_prepared(board)
        self.checkpoints.settle()
        if self.state.step < self.total_steps:
            return RankResult(finished=False, result={})
        return self._finish(board)

    def _prepares_at(self, step: int) -> bool:
        return self.objective.prepares_at(self._moment(step))

    def _prepare(self, step: int) -> float:
        """Prepares the objective where that is due; returns the seconds that it took."""
        begin = time.perf_counter()
        if self._prepares_at(step):
            if step == 0 and self.config.init_from is None:
                self.corpus.settle(self.objective.backbone)
            self.objective.prepare(self.corpus, self._moment(step))
        return time.perf_counter() - begin

    def _moment(self, step: int) -> Moment:
        return Moment(step, max(1, self.shards.num_samples // self.config.global_batch), self.total_steps)

    def _train_until_prepared(self, board: Any) -> bool:
        """Steps up to the next one that something is prepared at, whose batches may depend on it, or to the last one.

        Returns whether a stop was asked for.
        """
        stop = False
        with self._loader() as loader:
            batches = iter(loader)
            while not stop:
                self.feed()
                begin = time.perf_counter()
                waited = loader.wait_seconds
                raw = next(batches)
                wait = loader.wait_seconds - waited
                outcome = self.engine.step(self._micro_batches(raw), self.state.step, stop=self._stop_asked())
                if outcome.applied:
                    self.objective.after_step((self.state.step + 1) / self.total_steps)
                stop = outcome.stop
                self._advance(raw, time.perf_counter() - begin, wait)
                self._trace(raw)
                self._log(outcome.metrics, board)
                save = self._due(self.config.checkpoint_every) or self._due(self.config.keep_every)
                if save or self._due(self.config.evaluate_every):
                    self._evaluate(board)
                if save or stop:
                    self._checkpoint()
                if self.state.step >= self.total_steps or self._prepares_at(self.state.step):
                    break
        return stop

    def _loader(self) -> TrainLoader:
        config = self.config
        return TrainLoader(
            self.shards,
            rank=self.rank,
            world_size=self.world_size,
            num_streams=config.num_streams,
            global_batch=config.global_batch,
            seed=self.run_config.seed,
            shuffle_block=config.shuffle_block,
            cursors=[self.state.cursors.get(stream, Cursor()) for stream in range(config.num_streams)],
            reader=self.reader,
            decode_threads=config.decode_threads,
            prefetch=config.prefetch,
            partners=self._partners,
        )

    def _partners(self, ids: torch.Tensor, epochs: torch.Tensor) -> torch.Tensor | None:
        random = KeyedRandom.of(self.run_config.seed, epochs.to(self.device), ids.to(self.device))
        found = self.objective.partners(ids.to(self.device), random.fold("partners"))
        return None if found is None else found.cpu()

    def _micro_batches(self, raw: RawBatch) -> list[Batch]:
        """Views of this rank's samples, cut into the passes of one step."""
        size = self.engine.micro_batch
        batches = []
        for start in range(0, len(raw.ids), size):
            part = slice(start, start + size)
            ids, epochs = raw.ids[part].to(self.device), raw.epochs[part].to(self.device)
            random = KeyedRandom.of(self.run_config.seed, epochs, ids)
            batch = self._batch(raw.inputs[part], random, ids)
            if raw.partners is not None:
                beside = self._batch(raw.partners[part], random.fold("partner"), ids)
                batch = dataclasses.replace(batch, partner=beside)
            batches.append(batch)
        return batches

    @torch.no_grad()
    def _batch(self, raw: torch.Tensor, random: KeyedRandom, ids: torch.Tensor) -> Batch:
        inputs = as_input(raw.to(self.device, non_blocking=True))
        return Batch(self.objective.make_views(inputs, random.fold("views")), random.fold("objective"), ids)

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

    def _stop_asked(self) -> bool:
        """A file on rank 0; and, now and then since every rank has to ask, a notice about its machines."""
        noticed = self._due(self.config.log_every) and self.notice()
        return noticed or (self.rank == 0 and any(storage.appeared(self.folder / name) for name in (STOP, MOVE)))

    def _trace(self, raw: RawBatch) -> None:
        if not self.config.trace_samples:
            return
        gathered: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(gathered, raw.keys)
        if self.traced is not None:
            self.traced.append(step=self.state.step, keys=sorted(itertools.chain.from_iterable(gathered)))

    def _read_failures(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What was found unreadable before the checkpoint that this run goes on from: (shard, record) -> its line."""
        path = storage.bring(self.folder / FAILED)
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
        self.feed()
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
        self.feed()
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (self.state.cursors, self.failures))
        for cursors, failures in gathered:
            self.state.cursors.update({s: c for s, c in cursors.items() if self._newer(s, c)})
            self.failures.update(failures)
        if self.rank == 0 and self.failures:
            lines = [json.dumps(self.failures[sample]) for sample in sorted(self.failures)]
            write_atomic(self.folder / FAILED, "\n".join(lines) + "\n")
        for log in filter(None, (self.metrics, self.traced)):
            log.publish()
        if self.rank == 0:
            storage.publish_tree(self.folder / "tensorboard")
        self.checkpoints.save(self.engine, self.state, self.config.backbone.input_size(self.config.views))

    def _newer(self, stream: int, cursor: Any) -> bool:
        known = self.state.cursors.get(stream)
        return known is None or (cursor.epoch, cursor.position) > (known.epoch, known.position)

    def _retries(self) -> int:
        """Requests to a store that the ranks had to send again."""
        counts = [0] * self.world_size
        dist.all_gather_object(counts, storage.retries())
        return sum(counts)

    def _versions(self) -> dict[str, str]:
        """What this rank really runs; Ray's only where Ray started it."""
        started_by = {"ray": sys.modules["ray"].__version__} if "ray" in sys.modules else {}
        return {**self.engine.versions, **started_by}

    def _finish(self, board: Any) -> RankResult:
        self.state.seconds += self._prepare(self.total_steps)
        measured = self._evaluate(board)
        self._checkpoint()
        self.checkpoints.settle()
        share = len(self.failures) / self.shards.num_samples
        if share > self.config.max_failed_share:
            raise StageError(
                "pretrain: too many samples failed",
                got=f"{len(self.failures)} of {self.shards.num_samples} ({share:.2%})",
                allowed=f"at most {self.config.max_failed_share:.2%} (pretrain.max_failed_share)",
                fix=f"read the reasons in {self.folder / 'failed'}, or raise pretrain.max_failed_share",
            )
        if self.rank == 0:
            board.close()
            last = self.folder / "checkpoints" / self.checkpoints.entries()[-1]["name"]
            copy_objective(last / "objective", self.folder / "objective")
            copy_backbone(last / "backbone", self.folder / "backbone")
        dist.barrier()
        state = self.state
        result = {
            "world_size": self.world_size,
            "zero_stage": self.engine.zero_stage,
            "backend": dist.get_backend(),
            "device": str(self.device),
            "precision": self.engine.precision,
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
            "warnings": warnings_of(measured, self.config.collapse),
            "healthy": state.unhealthy_evaluations == 0,
            "storage_retries": self._retries(),
        }
        return RankResult(finished=True, result=result)
