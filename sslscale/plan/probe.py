"""A short training of the ranks that fit this machine, each on the batch that it has in the run: what they take."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslscale.config import RunConfig, validate
from sslscale.errors import StageError
from sslscale.plan.model import Measured

_STATE_VALUES = {"adamw": 2.0, "sgd": 1.0, "lars": 1.0}
_SAMPLE_SECONDS = 0.01
_WARM_SHARE = 3  # the first step in so many is not timed


@dataclass(frozen=True)
class Probe:
    """What was measured, and on what."""

    measured: Measured
    device: str
    device_bytes: int
    """Memory of the device, all of it."""


def probe(config: RunConfig, ranks: int, steps: int, at_once: int | None = None) -> Probe:
    """Trains `steps` steps as `at_once` of `ranks` ranks would, in a temporary folder. StageError where that fails.

    They share this machine, memory, cores and links, as in the run; none: as many as have a GPU, or threads, here.
    """
    at_once = at_once or min(ranks, _places(config))
    context = multiprocessing.get_context("spawn")
    answers: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (answers, short_run(config, ranks, at_once, steps).model_dump(mode="json"), folder, at_once)
        group = [context.Process(target=_answer, args=(*arguments, rank), daemon=True) for rank in range(at_once)]
        for process in group:
            process.start()
        while answers.empty() and not any(process.exitcode for process in group):
            time.sleep(0.1)
        answer: Probe | StageError = _died(group) if answers.empty() else answers.get()
        for process in group:
            if isinstance(answer, StageError):
                process.kill()
            process.join()
    if isinstance(answer, StageError):
        raise answer
    return answer


def _places(config: RunConfig) -> int:
    """Ranks that this machine has a device for."""
    import torch

    assert config.pretrain is not None
    if config.pretrain.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // config.pretrain.threads)


def _died(group: list[Any]) -> StageError:
    return StageError(
        "plan: the short training that measures this config ended without a result",
        got=f"exit code {next(process.exitcode for process in group if process.exitcode)}",
        fix="a negative code is a signal: 9 is the out-of-memory killer's; lower pretrain.micro_batch",
    )


def short_run(config: RunConfig, ranks: int, at_once: int, steps: int) -> RunConfig:
    """The config of a run that is the share of `at_once` of `config`'s `ranks` ranks."""
    assert config.pretrain is not None
    plain = config.model_dump(mode="json")
    plain["pretrain"] |= {
        "global_batch": config.pretrain.global_batch // ranks * at_once,
        "num_streams": config.pretrain.num_streams // ranks * at_once,
        "num_workers": at_once,
        "epochs": None,
        "steps": steps,
        "checkpoint_every": 10 * steps,
        "keep_every": 0,
        "evaluate_every": 0,
        "evaluate_samples": -(-config.pretrain.evaluate_samples * at_once // ranks),
        "collapse": None,
    }
    return validate(RunConfig, plain)


def _answer(answers: Any, config: dict[str, Any], folder: str, ranks: int, rank: int) -> None:
    """One rank; the first of them answers, and whoever fails."""
    try:
        found = _measure(validate(RunConfig, config), Path(folder), ranks, rank)
        if rank == 0:
            answers.put(found)
    except Exception as error:
        answers.put(StageError(f"plan: the short training failed: {error}"))


def import_all() -> None:
    """What every rank imports, before anything of its own."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    import deepspeed  # noqa: F401

    import sslscale.pretrain.loop  # noqa: F401


def _measure(config: RunConfig, folder: Path, ranks: int, rank: int) -> Probe:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}  # as launchers do
    import_all()
    import torch
    import torch.distributed as dist

    from sslscale.corpus import TOOLS
    from sslscale.pretrain.loop import Trainer
    from sslscale.pretrain.stage import fit_backbone
    from sslscale.shards.cache import ShardCache
    from sslscale.shards.dataset import open_shards

    assert config.pretrain is not None
    seconds: list[float] = []
    first_end: list[float] = []

    class Timed(Trainer):
        def _advance(self, raw: Any, took: float, wait: float) -> None:
            super()._advance(raw, took, wait)
            seconds.append(took)
            first_end[:] = first_end or [time.perf_counter()]

    cuda = config.pretrain.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    backend = "nccl" if cuda else "gloo"
    shards = open_shards(config.datasets[config.pretrain.dataset], ShardCache.of(config), config.limit)
    with _peak_anonymous() as peak:
        begin = time.perf_counter()
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
        if rank == 0:
            fit_backbone(folder / "pretrain", config.pretrain, shards)
        dist.barrier()
        trainer = Timed(folder / "pretrain", config, TOOLS)
        trained = trainer.train().result
        checkpoints = folder / "pretrain" / "checkpoints"
        checkpoint_bytes = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    peaks = [0] * ranks
    dist.all_gather_object(peaks, torch.cuda.max_memory_allocated() if cuda else peak[0])
    step_seconds = statistics.median(seconds[len(seconds) // _WARM_SHARE :])
    parameters = list(trainer.objective.parameters())
    measured = Measured(
        ranks=ranks,
        parameters=trained["num_parameters"],
        trained=sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in parameters if p.requires_grad),
        state_values=_STATE_VALUES[config.pretrain.optimizer.name],
        zero_stage=config.pretrain.zero_stage,
        offloaded=cuda and config.pretrain.offload_optimizer == "cpu",
        peak_bytes=max(peaks),
        step_seconds=step_seconds,
        warming_seconds=max(0.0, sum(seconds) - len(seconds) * step_seconds),
        samples=config.pretrain.global_batch // ranks,
        sample_bytes=sum(info.bytes for info in shards.shards) / sum(info.samples for info in shards.shards),
        checkpoint_bytes=checkpoint_bytes,
        start_seconds=first_end[0] - begin,
    )
    dist.destroy_process_group()
    return Probe(measured, _device_name(cuda), _device_bytes(cuda))


def _device_name(cuda: bool) -> str:
    import torch

    from sslscale.provenance import hardware

    return torch.cuda.get_device_name() if cuda else hardware()["cpu"]


def _device_bytes(cuda: bool) -> int:
    import psutil
    import torch

    return torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total


@contextlib.contextmanager
def _peak_anonymous() -> Iterator[list[int]]:
    """The most anonymous memory that this process has within the block, above what it has now: one int, in bytes.

    Pages of files are left out: a memory-mapped shard is the system's to drop.
    """
    baseline, peak, over = anonymous_bytes("self"), [0], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous_bytes("self") - baseline)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def anonymous_bytes(pid: int | str) -> int:
    """RssAnon of a process (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0
