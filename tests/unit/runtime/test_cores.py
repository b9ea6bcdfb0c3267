"""Ranks of one machine compute on cores of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sslscale.runtime.cores import share_of_cores


@pytest.mark.parametrize("cores,ranks", [(8, 2), (8, 3), (7, 2), (4, 4), (64, 8)])
def test_shares_are_disjoint_and_leave_no_core_out(tmp_path: Path, cores: int, ranks: int) -> None:
    shares = [share_of_cores(range(cores), rank, ranks, 1, tmp_path) for rank in range(ranks)]
    assert sorted(core for share in shares for core in share) == list(range(cores))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_threads_that_do_not_fit_into_a_share_may_go_everywhere(tmp_path: Path) -> None:
    assert share_of_cores([3, 5], 1, 2, 1, tmp_path) == {5}
    assert share_of_cores([3, 5], 1, 2, 2, tmp_path) == {3, 5}
    assert share_of_cores([3, 5], 2, 4, 1, tmp_path) == {3, 5}


def test_hardware_threads_of_a_core_and_cores_of_a_socket_stay_together(tmp_path: Path) -> None:
    for cpu in range(8):  # two sockets of two cores of two threads, numbered as Linux does: siblings lie far apart
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu // 2 % 2}\n")
        (folder / "core_id").write_text(f"{cpu % 2}\n")
    shares = [share_of_cores(range(8), rank, 4, 1, tmp_path) for rank in range(4)]
    assert shares == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


TALK = """
import os, threading, time
from sslscale.runtime.cores import keep_to_own_cores
asleep = threading.Thread(target=time.sleep, args=(60,), daemon=True)
asleep.start()
keep_to_own_cores(1)
keep_to_own_cores(1)
print(sorted({frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}, key=sorted))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads keep to cores on Linux only")
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_thread_keeps_to_its_share(ranks: int) -> None:
    cores = os.sched_getaffinity(0)
    environment = {**os.environ, "LOCAL_RANK": str(ranks - 1), "LOCAL_WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", TALK], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([frozenset(share_of_cores(cores, ranks - 1, ranks, 1))])
