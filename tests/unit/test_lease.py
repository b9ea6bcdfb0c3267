"""Who holds a run directory."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import sslscale.lease as leases
from sslscale import storage
from sslscale.errors import UserError
from sslscale.rundir import RunDir, read_json, write_atomic, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def lease(run: RunDir) -> Path:
    """The lease that counts."""
    return sorted((run.path / ".lease").iterdir())[-1]


def test_a_run_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match="cannot be written"), RunDir(path):
            pass


def test_a_lease_is_released(run: RunDir) -> None:
    for _ in range(2):
        with run:
            holder = read_json(lease(run))
            assert holder["pid"] == os.getpid()
        assert not (run.path / ".lease").exists()


_HOLD = """
import sys, time
from sslscale.rundir import RunDir
with RunDir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_live_process_is_refused_and_a_killed_one_is_not_waited_for(run: RunDir) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"held by pid {holder.pid} on"), run:
        pass
    holder.kill()
    holder.wait()
    assert read_json(lease(run))["pid"] == holder.pid
    with run:
        assert read_json(lease(run))["pid"] == os.getpid()
        assert len(list((run.path / ".lease").iterdir())) == 1
    holder.stdout.close()


def _as_if_held(run: RunDir, number: int = 5, **changes: Any) -> None:
    own = {"machine": leases._machine(), "pid": os.getpid(), "start": leases._start_time(os.getpid())}
    write_json(run.path / ".lease" / f"{number:08d}", {"token": "theirs", **own, "time": time.time(), **changes})


def test_who_is_alive(run: RunDir) -> None:
    start = leases._start_time(os.getpid())
    assert start is not None
    elsewhere = {"machine": "far-away pid:[7]", "pid": 1}
    for alive in ({}, {"start": start + 0.5}, {**elsewhere, "time": time.time() - leases.LEASE_SECONDS + 5}):
        _as_if_held(run, **alive)
        with pytest.raises(UserError, match="in use by another process"), run:
            pass
    for dead in ({"start": start - 100}, {**elsewhere, "time": time.time() - leases.LEASE_SECONDS - 1}):
        _as_if_held(run, **dead)
        with run:
            assert read_json(lease(run))["token"] != "theirs"


def test_a_heartbeat_renews_the_lease_and_a_lost_one_stops_the_work(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever an earlier test's library has set
    with run:
        first = read_json(lease(run))["time"]
        time.sleep(0.3)
        assert read_json(lease(run))["time"] > first
        with pytest.raises(KeyboardInterrupt):
            _as_if_held(run, machine="far-away")
            time.sleep(5)
    assert leases.lost() and "held by pid" in capsys.readouterr().err
    assert json.loads(lease(run).read_text())["token"] == "theirs"


def test_a_name_that_is_being_written_counts_as_a_holder_for_a_while(run: RunDir) -> None:
    half = run.path / ".lease" / "00000003"
    write_atomic(half, "")
    with pytest.raises(UserError, match="in use"), run:
        pass
    long_ago = time.time() - leases.LEASE_SECONDS - 1
    os.utime(half, (long_ago, long_ago))
    with run:
        assert lease(run).name == "00000004"


def test_who_comes_late_to_a_dead_lease_gives_way_to_a_living_one(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this process's look at a dead lease and its own, others have come and gone, and one has begun at 1."""
    _as_if_held(run, number=1, machine="far-away", time=0)
    create = storage.create

    def late(path: Path, data: bytes) -> bool:
        _as_if_held(run, number=1)
        return create(path, data)

    monkeypatch.setattr(storage, "create", late)
    with pytest.raises(UserError, match="in use"), run:
        pass
    assert lease(run).name == "00000001"


def _contend(path: str, start: Any, held: Any) -> None:
    start.wait()
    try:
        with RunDir(path):
            held.put(os.getpid())
            signal.pause()
    except UserError:
        held.put(None)


def test_one_of_many_contenders_holds_it(run: RunDir) -> None:
    context = multiprocessing.get_context("fork")
    start, held = context.Event(), context.Queue()
    contenders = [context.Process(target=_contend, args=(str(run.path), start, held)) for _ in range(8)]
    for process in contenders:
        process.start()
    start.set()
    winners = [held.get(timeout=20) for _ in contenders]
    for process in contenders:
        process.kill()
        process.join()
    assert sum(winner is not None for winner in winners) == 1
