"""How Ray is started: addresses that do not answer, paths too long for its sockets, clusters that are too small."""

from __future__ import annotations

import os
import time

import pytest
import torch

from sslscale.errors import StageError, UserError
from sslscale.runtime import ray as ray_module
from sslscale.runtime.address import cluster_address, unreachable


def test_an_address_that_does_not_answer_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_module.ray, "is_initialized", lambda: False)
    began = time.monotonic()
    with pytest.raises(UserError, match="the Ray cluster could not be joined") as error:
        ray_module.RayRuntime("127.0.0.1:1").start()
    assert time.monotonic() - began < 10
    assert "127.0.0.1:1" in str(error.value)


@pytest.mark.parametrize("address", ["nonsense", "host", "host:port", "ray://127.0.0.1:1"])
def test_what_is_unreachable(address: str) -> None:
    assert unreachable(address)


def test_a_submitted_job_joins_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_module.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:2"):
        ray_module.RayRuntime().start()


@pytest.mark.parametrize(
    ("given", "variable", "address"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        ("local", "host:1", None),
        (None, "host:1", "host:1"),
        ("other:2", "host:1", "other:2"),
        ("other:2", "local", "other:2"),
    ],
)
def test_local_is_no_address(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variable: str | None, address: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(given) == address
    assert ray_module.RayRuntime(given)._address == address


class FakeRay:
    """Stands in for a cluster's life: how many CPUs each one had, and how many were ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[float] = []
        self.ended = 0
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        for name in ("init", "shutdown", "is_initialized", "cluster_resources"):
            monkeypatch.setattr(ray_module.ray, name, getattr(self, name))

    def init(self, num_cpus: float = 16.0, **options: object) -> None:
        assert not self.is_initialized()
        self.started.append(num_cpus)

    def shutdown(self) -> None:
        self.ended += 1

    def is_initialized(self) -> bool:
        return len(self.started) > self.ended

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.started[-1]}


def test_a_cluster_of_our_own_grows_with_what_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, runtime = FakeRay(monkeypatch), ray_module.RayRuntime()
    for cpus in (0, 3, 8, 0, 2):  # workers, ranks that find room, more ranks, workers again
        runtime.start(cpus)
    assert (fake.started, fake.ended) == ([4, 8], 1)
    assert runtime.alone
    runtime.close()
    assert fake.ended == 2


def test_a_cluster_that_was_joined_or_is_the_callers_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    monkeypatch.setattr(ray_module, "unreachable", lambda address: None)
    joined = ray_module.RayRuntime("host:1")
    joined.start()
    joined.start(99)
    callers = ray_module.RayRuntime()
    callers.start(99)
    assert (fake.started, fake.ended) == ([16.0], 0)


def test_a_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    options = ray_module._local_cluster(cpus=3)
    assert options["num_cpus"] == max(os.cpu_count() or 1, 4)
    assert ray_module._local_cluster(cpus=500)["num_cpus"] == 500
    assert not options["include_dashboard"]
    assert "_temp_dir" not in options
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch/" + "x" * 60)
    assert ray_module._local_cluster(cpus=0)["_temp_dir"] == "/tmp/ray"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("address", "gpus", "given", "expected"),
    [
        ("ray:1", 4, "auto", "cuda"),
        ("ray:1", 4, "cpu", "cpu"),
        ("ray:1", 0, "auto", "cpu"),
        ("ray:1", 0, "cuda", "cuda"),  # asked for, they start
        (None, 1, "auto", "cuda"),
    ],
)
def test_the_cluster_says_whether_there_are_gpus_not_its_driver(monkeypatch, address, gpus, given, expected):
    runtime = ray_module.RayRuntime(address)
    runtime._connected_here = True
    monkeypatch.setattr(runtime, "start", lambda: None)
    monkeypatch.setattr(ray_module.ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": gpus} if gpus else {}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.device(given) == expected


def test_a_cluster_of_this_machine_alone_never_gets_a_gpu(monkeypatch):
    runtime = ray_module.RayRuntime()
    runtime._connected_here = True
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(runtime, "_address", None)
    monkeypatch.setattr(runtime, "start", lambda: None)
    monkeypatch.setattr(ray_module.ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match="no CUDA device"):
        runtime.device("cuda")
