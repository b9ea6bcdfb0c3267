"""Starts the ranks of a pretraining run, and all of them again when one is lost: the driver's side.

start the group at a number of ranks that there is room for -> wait
    done, or an error that would only come again  -> say so
    a stop was asked for, and the ranks have saved -> Interrupted
    a rank was lost                                -> again, from the last checkpoint, while checkpoints still come
    another placement was asked for                -> again

Neither torch's launcher nor Ray Train restarts by itself: they could not tell a lost rank from an error that would
only come again, and a number of ranks that they chose might not divide the streams.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sslscale import lease, storage
from sslscale.config import PretrainConfig, RunConfig
from sslscale.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted, StageError, UserError
from sslscale.pretrain.placement import rank_device
from sslscale.pretrain.ranks import MOVE, OUTCOME, STACKS, STOP, run_in_group, run_rank
from sslscale.rundir import read_json
from sslscale.runtime.base import Runtime

if TYPE_CHECKING:
    from sslscale.pretrain.corpus import CorpusTools

_LOOK_SECONDS = 10.0  # between looks at whether the cluster has room for more ranks
_START_SECONDS = 10  # how long a group waits for its places before another size is tried


class NoRoom(Exception):
    """The group could not be placed within _START_SECONDS: no rank has run."""


class Group(Protocol):
    """Where ranks run. `shares_process`: a single rank runs in this process."""

    shares_process: bool
    device: str
    """cpu or cuda: what every rank computes on."""

    def room(self) -> int:
        """How many ranks the machines that are there now would hold."""
        ...

    def spare(self) -> int:
        """How many ranks would find a place beside what runs now."""
        ...

    def run(self, settings: dict[str, Any], size: int) -> None:
        """Runs `size` ranks to their end. Raises a rank's UserError, NoRoom, or whatever tells that a rank was lost."""
        ...


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
    with _stop_on_signal(folder / STOP) as interrupted:
        result = _Launch(folder, config.pretrain, group, tick, interrupted).until_done(settings)
    if result is None:
        raise Interrupted(interrupted[0] if interrupted else EXIT_SIGTERM)
    return result


class _Launch:
    """The restarts of one call."""

    def __init__(
        self,
        folder: Path,
        config: PretrainConfig,
        group: Group,
        tick: Callable[[], None],
        interrupted: Sequence[int] = (),
    ) -> None:
        self.folder, self.config, self.group, self.tick = folder, config, group, tick
        self._interrupted = interrupted
        self.sizes = config.world_sizes
        self.restarts = self.moves = 0
        self.left = config.max_restarts
        self._looked = time.monotonic()
        self._stop_told = False

    def until_done(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Rank 0's result; None where the ranks have saved and stopped because they were asked to."""
        limit = self.sizes[-1]
        while True:
            size = largest(self.sizes, min(limit, self.group.room()))
            before = self._newest()
            failure = self._attempt(settings, size)
            if isinstance(failure, UserError):
                raise failure
            if isinstance(failure, NoRoom):
                if storage.appeared(self.folder / STOP, every=0.0):
                    return None
                limit = largest(self.sizes, size - 1)
                _say(f"no room for {size} ranks yet, waiting")
                continue
            limit = self.sizes[-1]
            if failure is not None:
                self._count_loss(failure, progressed=self._newest() != before)
                continue
            outcome = read_json(storage.refresh(self.folder / OUTCOME))
            if outcome["finished"]:
                storage.pull(self.folder)
                retries = outcome["result"].pop("storage_retries")
                storage.count_retries(0 if self.group.shares_process else retries)
                return {**outcome["result"], "restarts": self.restarts, "moves": self.moves}
            if storage.appeared(self.folder / STOP, every=0.0):
                return None
            self.moves += 1
            _say("the ranks have saved, and start again where there is room")

    def _attempt(self, settings: dict[str, Any], size: int) -> BaseException | None:
        self._was_full = False
        for name in (OUTCOME, MOVE):
            storage.remove(self.folder / name)
        stacks = self.folder / STACKS / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.restarts + self.moves}"
        try:
            return _watch(lambda: self.group.run({**settings, "stacks": str(stacks)}, size), lambda: self._tick(size))
        finally:
            _discard_empty(self.folder / STACKS)

    def _tick(self, size: int) -> None:
        """Shows the progress, hands on a stop, and asks the ranks to save and move where more would find a place."""
        self.tick()
        if self._interrupted and not self._stop_told:
            self._stop_told = True
            storage.write_atomic(self.folder / STOP, "")  # the handler has made it here only
        if size < self.sizes[-1] and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            grows = largest(self.sizes, size + min(self.group.spare(), self.group.room() - size)) > size
            if grows and self._was_full:  # else the places seen may be those that this group is about to take
                storage.write_atomic(self.folder / MOVE, "")
            self._was_full = not grows

    def _count_loss(self, failure: BaseException, progressed: bool) -> None:
        self.left = (self.config.max_restarts if progressed else self.left) - 1
        if self.left < 0 or storage.appeared(self.folder / STOP, every=0.0):
            lines = str(failure).strip().splitlines()
            raise StageError(
                "pretrain: the ranks stopped before the end, and restarting them did not help",
                got=lines[-1] if lines else type(failure).__name__,
                fix="run the same command again: it goes on from the last checkpoint; "
                f"{self.folder / STACKS} says where each rank was (-v shows the ranks' own output)",
            ) from failure
        self.restarts += 1
        _say(f"a rank was lost ({type(failure).__name__}); restart {self.restarts}, from the last checkpoint")

    def _newest(self) -> str | None:
        listing = self.folder / "checkpoints.json"
        return read_json(listing)["checkpoints"][-1]["name"] if storage.refresh(listing).is_file() else None


def largest(sizes: list[int], most: int) -> int:
    """The largest of the ascending `sizes` that is at most `most`; the smallest where none is."""
    return max((size for size in sizes if size <= most), default=sizes[0])


def _say(what: str) -> None:
    print(f"pretrain: {what}", file=sys.stderr, flush=True)


def _discard_empty(stacks: Path) -> None:
    """Ranks that ended well, or were killed, have left nothing to read."""
    for file in stacks.glob("*/*"):
        if file.stat().st_size == 0:
            file.unlink()
    for folder in (*stacks.glob("*"), stacks):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


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
        if lease.lost():
            raise KeyboardInterrupt  # to ask the ranks would be to ask those of who holds the run now
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
