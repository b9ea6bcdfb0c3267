"""The processes of the local runtime: none outlives its pool or its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sslscale.runtime.base import Pool, Resources, make_runtime
from sslscale.runtime.local import LocalRuntime


class Sleeper:
    def __init__(self) -> None:
        pass

    def sleep(self, item: float, broadcast: str | None) -> int:
        if broadcast is not None:
            (Path(broadcast) / str(os.getpid())).touch()
        time.sleep(item)
        return os.getpid()

    def meet(self, item: str, broadcast: str) -> str:
        _meet(Path(broadcast), item)
        return str(os.getpid())

    def unpicklable(self, item: Any, broadcast: Any) -> Any:
        if item == "error":
            raise Unpicklable(lambda: None)
        return lambda: None


class Unpicklable(Exception):
    pass


def _meet(folder: Path, name: str) -> None:
    """Leaves `name` in a folder and waits until two are there, so that both workers have an item, however slow."""
    (folder / name).touch()
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


def _hold_a_pool(folder: str) -> None:
    with LocalRuntime().pool(Sleeper, {}, 2) as pool:
        list(pool.map("sleep", [60, 60], folder))


def _gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_workers_end_with_the_pool(tmp_path: Path) -> None:
    pool: Pool
    with LocalRuntime().pool(Sleeper, {}, 2) as pool:
        pids = {int(pid) for _, pid in pool.map("meet", ["one", "two"], str(tmp_path))}
        assert len(pids) == 2
        assert os.getpid() not in pids
    assert _gone(list(pids), 2)


def test_workers_end_with_a_parent_that_is_killed_while_they_work(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_local_processes as t; "
    parent = subprocess.Popen([sys.executable, "-c", script + f"t._hold_a_pool({str(tmp_path)!r})"])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(file.name) for file in tmp_path.iterdir()]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert len(pids) == 2
    assert _gone(pids, 5)


def test_what_cannot_be_pickled_is_an_error_and_the_worker_goes_on() -> None:
    with LocalRuntime().pool(Sleeper, {}, 2) as pool:
        with pytest.raises(Exception, match=r"pickle|lambda"):
            list(pool.map("unpicklable", ["result"]))
        with pytest.raises(Exception, match="a worker failed: Unpicklable"):
            list(pool.map("unpicklable", ["error"]))
        with pytest.raises(Exception, match=r"pickle|lambda"):
            list(pool.map("sleep", [lambda: None]))
        assert len(list(pool.map("sleep", [0, 0, 0]))) == 3


def test_make_runtime_starts_nothing() -> None:
    before = psutil.Process().children(recursive=True)
    assert make_runtime("local").name == "local"
    runtime = make_runtime("ray", address="127.0.0.1:1")
    runtime.close()
    assert runtime.name == "ray"
    assert psutil.Process().children(recursive=True) == before


class SeesGpu:
    def see(self, item: int, broadcast: str) -> str:
        """Waits until a worker of each GPU has an item: how long one takes to start says nothing."""
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        _meet(Path(broadcast), gpu)
        return gpu

    def die_of(self, gpu: str, broadcast: str) -> str:
        mark = Path(broadcast).parent / "died"
        if os.environ["CUDA_VISIBLE_DEVICES"] == gpu and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.see(0, broadcast)


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    with LocalRuntime().pool(SeesGpu, {}, 4, Resources(gpus=1.0)) as pool:
        assert {seen for _, seen in pool.map("see", range(4), str(before))} == {"3", "5"}
        assert {seen for _, seen in pool.map("die_of", ["5"] * 4, str(after))} == {"3", "5"}
    assert (tmp_path / "died").exists()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_script_that_its_own_workers_run_again_is_told_how_to_be_written(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from collections import Counter\n"
        "from sslscale.runtime.local import LocalRuntime\n"
        "with LocalRuntime(max_retries=0).pool(Counter, {}, 2) as pool:\n"
        "    list(pool.map('total', [1, 2]))\n"
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert found.returncode != 0
    assert "before it was ready" in found.stderr
    assert 'if __name__ == "__main__":' in found.stderr
