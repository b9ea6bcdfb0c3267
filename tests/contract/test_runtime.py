"""One contract over every runtime, with 1 and 2 workers. Ray and torch's import make up nearly all of its time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sslscale.errors import StageError, UserError
from sslscale.runtime.base import Resources, Runtime
from sslscale.runtime.local import LocalRuntime

RUNTIMES = ["local-1", "local-2", "ray-1", "ray-2"]
APART = ["local-2", "ray-1", "ray-2"]  # workers in processes of their own


@pytest.fixture(scope="module", autouse=True)
def _classes_travel_by_value() -> None:
    """Ray's workers see installed packages only, which this file is not in."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> Iterator[tuple[Runtime, int]]:
    name, workers = request.param.split("-")
    yield LocalRuntime() if name == "local" else request.getfixturevalue("ray_runtime"), int(workers)


class Probe:
    def __init__(self, base: int = 0, broken: bool = False) -> None:
        if broken:
            raise UserError("cannot be built", got=base)
        self.base = base

    def add(self, item: int, broadcast: Any) -> int:
        return self.base + item + (0 if broadcast is None else int(broadcast[item]))

    def fail(self, item: int, broadcast: Any) -> int:
        if item == 1:
            raise UserError("a bad item", got=item, fix="give another")
        return item

    def die_once(self, item: tuple[int, str], broadcast: Any) -> int:
        number, flag = item
        if number == 2 and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number + broadcast

    def die(self, item: str, broadcast: Any) -> None:
        with Path(item).open("a") as file:
            file.write("x")
        os._exit(1)


class Compute:
    """Work whose last bits depend on the number of threads and on whatever else a worker could leak into it."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def product(self, seed: int, weights: np.ndarray) -> tuple[bytes, set[int]]:
        from threadpoolctl import threadpool_info

        rows = np.random.default_rng(seed).standard_normal((257, 640), dtype=np.float32)
        by_numpy = rows @ weights
        by_torch = self.torch.from_numpy(rows).matmul(self.torch.tensor(weights)).softmax(1).sum(0).numpy()
        threads = {pool["num_threads"] for pool in threadpool_info()} | {self.torch.get_num_threads()}
        return by_numpy.tobytes() + by_torch.tobytes(), threads


class Broadcast:
    """Counts how often this process pickles it."""

    pickled: ClassVar[int] = 0

    def __getitem__(self, item: int) -> int:
        return 100

    def __reduce__(self) -> Any:
        Broadcast.pickled += 1
        return Broadcast, ()


@pytest.mark.parametrize("runtime", RUNTIMES, indirect=True)
def test_results_broadcasts_and_errors(runtime: tuple[Runtime, int]) -> None:
    made, workers = runtime
    with made.pool(Probe, {"base": 10}, workers) as pool:
        assert sorted(pool.map("add", range(7))) == [(index, 10 + index) for index in range(7)]
        assert sorted(pool.map("add", [3, 4], np.arange(5) * 100)) == [(0, 313), (1, 414)]
        assert list(pool.map("add", [])) == []

        Broadcast.pickled = 0
        assert sorted(pool.map("add", range(7), Broadcast()))[6] == (6, 116)
        assert Broadcast.pickled <= 1

        with pytest.raises(UserError, match="a bad item") as raised:
            list(pool.map("fail", [0, 1, 2]))
        assert (raised.value.got, raised.value.fix, type(raised.value)) == (1, "give another", UserError)
        next(iter(pool.map("add", range(5))))  # an abandoned map leaves nothing behind
        assert sorted(pool.map("add", [1, 2])) == [(0, 11), (1, 12)]

    with pytest.raises(UserError, match="cannot be built"), made.pool(Probe, {"broken": True}, workers) as pool:
        list(pool.map("add", [1]))


@pytest.mark.parametrize("runtime", APART, indirect=True)
def test_a_killed_worker_is_replaced_and_nothing_is_lost(runtime: tuple[Runtime, int], tmp_path: Path) -> None:
    made, workers = runtime
    with made.pool(Probe, {}, workers) as pool:
        items = [(number, str(tmp_path / "died")) for number in range(6)]
        assert sorted(pool.map("die_once", items, 1000)) == [(number, number + 1000) for number in range(6)]
        assert (tmp_path / "died").exists()


@pytest.mark.parametrize("name", ["local-2", "ray-1"])
def test_an_item_that_kills_every_worker_ends_in_an_error(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Runtime
    if name == "local-2":
        made = LocalRuntime(max_retries=1)
    else:
        request.getfixturevalue("ray_runtime")
        from sslscale.runtime.ray import RayRuntime

        made = RayRuntime(max_retries=1)
    tries = tmp_path / "tries"
    with made.pool(Probe, {}, int(name[-1])) as pool:
        with pytest.raises(StageError, match="a worker was lost at item 0"):
            list(pool.map("die", [str(tries)]))
        assert tries.read_text() == "xx"
    made.close()


def test_the_same_bytes_everywhere(ray_runtime: Runtime) -> None:
    weights = np.random.default_rng(0).standard_normal((640, 64), dtype=np.float32)
    results = {}
    for made in (LocalRuntime(), ray_runtime):
        for workers in (1, 2):
            with made.pool(Compute, {}, workers, Resources(threads=1)) as pool:
                answers = [answer for _, answer in sorted(pool.map("product", range(6), weights))]
            assert {count for _, threads in answers for count in threads} == {1}
            results[made.name, workers] = b"".join(data for data, _ in answers)
    assert len(set(results.values())) == 1


@pytest.mark.parametrize("runtime", ["local-1", "ray-1"], indirect=True)
def test_threads_are_what_was_asked(runtime: tuple[Runtime, int]) -> None:
    made, workers = runtime
    with made.pool(Compute, {}, workers, Resources(threads=3)) as pool:
        [(_, (_, threads))] = pool.map("product", [0], np.ones((640, 2), np.float32))
    assert threads == {3}
