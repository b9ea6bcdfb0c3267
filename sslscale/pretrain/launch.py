"""Starts the ranks of a pretraining run: on this machine, or where Ray Train places them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslscale import storage
from sslscale.config import PretrainConfig, RunConfig
from sslscale.errors import EXIT_SIGTERM, Interrupted, UserError
from sslscale.pretrain.placement import rank_device
from sslscale.pretrain.ranks import STOP, run_in_group, run_rank
from sslscale.pretrain.restarts import NoRoom, Restarts, stop_on_signal
from sslscale.runtime.base import Runtime

if TYPE_CHECKING:
    from sslscale.pretrain.corpus import CorpusTools

_START_SECONDS = 10  # how long a group waits for its places before another size is tried


def launch(
    folder: Path, config: RunConfig, runtime: Runtime, tools: CorpusTools, tick: Callable[[], None]
) -> dict[str, Any]:
    """Runs all ranks to the end and returns rank 0's result; `tick` is called now and then while they work.

    `tools` is what every rank's objective computes with over the whole corpus.

    Raises UserError or StageError as a rank raised it, StageError when ranks were lost too often, and Interrupted when
    SIGINT or SIGTERM asked for a stop and the ranks have saved.
    """
    assert config.pretrain is not None
    storage.remove(folder / STOP)
    on_ray = runtime.name == "ray"
    group = _RayGroup(config.pretrain, runtime, folder) if on_ray else _LocalGroup(config.pretrain, runtime)
    dumped = config.model_dump(mode="json")
    dumped["pretrain"]["device"] = group.device  # a rank on a CPU may see GPUs that it has not been given
    settings = {"folder": str(folder), "config": dumped, "tools": tools}
    with stop_on_signal(folder / STOP) as interrupted:
        result = Restarts(folder, config.pretrain, group, tick, interrupted).until_done(settings)
    if result is None:
        raise Interrupted(interrupted[0] if interrupted else EXIT_SIGTERM)
    return result


@contextlib.contextmanager
def _environment(switches: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block, where the user has not set them: what runs later has none of them."""
    ours = {name: value for name, value in switches.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


class _LocalGroup:
    """This machine, without Ray: one rank in this process, more under torch's launcher."""

    def __init__(self, config: PretrainConfig, runtime: Runtime) -> None:
        from torch.cuda import device_count

        self.device = rank_device(config, runtime, device_count, grows=False)
        self._places = device_count() if self.device == "cuda" else config.world_sizes[-1]  # ranks may share cores
        self.shares_process = False

    def room(self) -> int:
        return self._places

    def spare(self) -> int:
        return 0

    def run(self, settings: dict[str, Any], size: int) -> None:
        self.shares_process = size == 1
        if self.shares_process:
            run_in_group({**settings, "shares_driver": True})
            return
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # Ranks that start again are forked from a process that has done their imports.
        multiprocessing.set_forkserver_preload(["sslscale.pretrain.loop"])
        launch_config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=f"pretrain-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="forkserver",
            monitor_interval=0.2,
        )
        with tempfile.TemporaryDirectory() as temporary:  # not in the run directory: its disk may be what is full
            error = Path(temporary) / "error"
            try:
                elastic_launch(launch_config, run_in_group)({**settings, "shares_driver": False, "error": str(error)})
            except ChildFailedError:
                if error.exists():
                    raise pickle.loads(error.read_bytes()) from None
                raise


class _RayGroup:
    """A Ray cluster: Ray Train places the ranks and connects them."""

    shares_process = False

    def __init__(self, config: PretrainConfig, runtime: Runtime, folder: Path) -> None:
        runtime.start(config.world_sizes[-1])  # type: ignore[attr-defined] # here, since it wants the main thread
        self._config, self._storage = config, storage.shown(folder / ".ray")
        threads = 1 if runtime.alone else config.threads  # type: ignore[attr-defined] # on one machine they share cores
        self.device = rank_device(config, runtime, _count_gpus, grows=not runtime.alone)  # type: ignore[attr-defined]
        self._each: tuple[str, int] = ("GPU", 1) if self.device == "cuda" else ("CPU", threads)
        self._switches = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_SECONDS)}
        if runtime.alone:  # type: ignore[attr-defined] # no cloud takes this machine away: no process to watch for that
            self._switches["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"

    def room(self) -> int:
        import ray

        return sum(self._places(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def spare(self) -> int:
        import ray

        return self._places(ray.available_resources())

    def _places(self, resources: Mapping[str, float]) -> int:
        kind, amount = self._each
        return int(resources.get(kind, 0) // amount)

    def run(self, settings: dict[str, Any], size: int) -> None:
        import ray
        from ray.train import ControllerError, FailureConfig, ScalingConfig, WorkerGroupError
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        kind, amount = self._each
        error: Any = ray.remote(num_cpus=0)(_FirstError).options(scheduling_strategy=_here()).remote()
        trainer = TorchTrainer(
            _run_rank_on_ray,
            train_loop_config={**settings, "shares_driver": False, "error": error},
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=kind == "GPU", resources_per_worker={kind: float(amount)}
            ),
            torch_config=TorchConfig(
                backend="nccl" if kind == "GPU" else "gloo", timeout_s=int(self._config.collective_timeout_s) + 1
            ),
            run_config=RayRunConfig(
                name=f"pretrain-{time.time_ns()}",  # a name used before would resume from Ray's own record
                storage_path=self._storage,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )
        try:
            with _environment(self._switches):
                trainer.fit()
        except ControllerError as failure:
            if type(failure.controller_failure).__name__.startswith("WorkerGroupStartup"):
                raise NoRoom from failure
            raise
        except WorkerGroupError:
            known: UserError | None = ray.get(error.get.remote())
            if known is None:
                raise
            raise known from None


def _count_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


class _FirstError:
    """An actor beside the driver, for the error that a restart cannot help: Ray Train would hand on its text."""

    def __init__(self) -> None:
        self._error: UserError | None = None

    def put(self, error: UserError) -> None:
        self._error = self._error or error

    def get(self) -> UserError | None:
        return self._error


def _here() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _run_rank_on_ray(settings: dict[str, Any]) -> None:
    import ray
    import ray.train

    try:
        run_rank(settings, notice=lambda: ray.train.get_preemption_info() is not None)
    except UserError as error:
        ray.get(settings["error"].put.remote(error))
        raise
