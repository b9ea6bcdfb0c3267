"""Starts the ranks of a pretraining run: Ray Train on a cluster, torch's launcher or this process without Ray.

Ranks and driver meet in the run directory: ranks leave `outcome.json` (rank 0, at the end) or `error.json` (an error
that a restart cannot help), and look for `stop-requested`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sslscale.config import RunConfig, validate
from sslscale.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted, StageError, UserError
from sslscale.rundir import read_json, write_json
from sslscale.runtime.base import Runtime

OUTCOME, ERROR, STOP = "outcome.json", "error.json", "stop-requested"


def run_rank(settings: dict[str, Any]) -> None:
    """One rank, inside an initialised torch.distributed. Errors that a restart cannot help are left for the driver."""
    folder = Path(settings["folder"])
    try:
        from sslscale.pretrain.loop import Trainer

        outcome = Trainer(folder, validate(RunConfig, settings["config"])).train()
    except UserError as error:
        parts = {"what": error.what, "got": _text(error.got), "allowed": _text(error.allowed), "fix": error.fix}
        write_json(folder / ERROR, {**parts, "failed": isinstance(error, StageError)})
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(folder / OUTCOME, {"finished": outcome.finished, "result": outcome.result})


def launch(folder: Path, config: RunConfig, runtime: Runtime, tick: Callable[[], None]) -> dict[str, Any]:
    """Runs all ranks to the end and returns rank 0's result; `tick` is called now and then while they work.

    Raises UserError or StageError as a rank raised it, StageError when ranks were lost too often, and Interrupted when
    SIGINT or SIGTERM asked for a stop and the ranks have saved.
    """
    for name in (OUTCOME, ERROR, STOP):
        (folder / name).unlink(missing_ok=True)
    settings = {"folder": str(folder), "config": config.model_dump(mode="json")}
    start = _start_ray if runtime.name == "ray" else _start_local
    if runtime.name == "ray":
        assert config.pretrain is not None
        runtime.start(config.pretrain.num_workers)  # type: ignore[attr-defined] # before, since it wants this thread
    with _stop_on_signal(folder / STOP) as interrupted:
        failure, restarts = _restarting(lambda: start(config, settings, runtime), tick, folder, config)
    if (folder / ERROR).exists():
        _raise_from(folder / ERROR)
    if failure is not None:
        raise StageError(
            "pretrain: the ranks stopped before the end, and restarting them did not help",
            got=str(failure).strip().splitlines()[-1] if str(failure).strip() else type(failure).__name__,
            fix="run the same command again: it goes on from the last checkpoint (-v shows the ranks' own output)",
        ) from failure
    outcome = read_json(folder / OUTCOME)
    if not outcome["finished"]:
        raise Interrupted(interrupted[0] if interrupted else EXIT_SIGTERM)
    return {**outcome["result"], "restarts": restarts}


def _restarting(
    work: Callable[[], None], tick: Callable[[], None], folder: Path, config: RunConfig
) -> tuple[BaseException | None, int]:
    """Starts the ranks, and all of them again when one is lost; the run's own list says where they go on.

    Neither launcher restarts by itself: it could not tell a lost rank from an error that would only come again.
    """
    assert config.pretrain is not None
    for attempt in range(config.pretrain.max_restarts + 1):
        failure = _watch(work, tick)
        if failure is None or (folder / ERROR).exists() or (folder / STOP).exists():
            break
        left = config.pretrain.max_restarts - attempt
        print(
            f"pretrain: a rank was lost ({type(failure).__name__}), {left} restarts left", file=sys.stderr, flush=True
        )
    return failure, attempt


def _watch(work: Callable[[], None], tick: Callable[[], None]) -> BaseException | None:
    """Runs `work` beside this thread, so that signals and the progress line stay with the main thread."""
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=guarded, name="sslscale-ranks", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
        tick()
    return failure[0] if failure else None


@contextlib.contextmanager
def _stop_on_signal(stop_file: Path) -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask the ranks to save and stop at their next step; a second one is not caught."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        received.append(EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM)
        stop_file.touch()
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _start_ray(config: RunConfig, settings: dict[str, Any], runtime: Runtime) -> None:
    """Ray Train places the ranks and connects them."""
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    assert config.pretrain is not None
    use_gpu = config.pretrain.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= config.pretrain.num_workers
    trainer = TorchTrainer(
        run_rank,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=config.pretrain.num_workers, use_gpu=use_gpu),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RayRunConfig(
            name=f"pretrain-{time.time_ns()}",  # a name used before would resume from Ray's own record
            storage_path=str(Path(settings["folder"]) / "ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    trainer.fit()


def _start_local(config: RunConfig, settings: dict[str, Any], runtime: Runtime) -> None:
    """One rank in this process; more under torch's launcher."""
    assert config.pretrain is not None
    if config.pretrain.num_workers == 1:
        run_in_group(settings)
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.pretrain.num_workers,
        run_id=f"pretrain-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.2,
    )
    elastic_launch(launch_config, run_in_group)(settings)


def run_in_group(settings: dict[str, Any]) -> None:
    """`run_rank` inside a process group of its own: this process alone, or what torch's launcher describes."""
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = settings["config"]["pretrain"]["device"] != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        run_rank(settings)
    finally:
        dist.destroy_process_group()


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _raise_from(path: Path) -> None:
    error = read_json(path)
    cls = StageError if error.pop("failed") else UserError
    raise cls(error.pop("what"), **error)
