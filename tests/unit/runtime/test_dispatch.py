"""Dispatching with scripted workers: what is lost when, and what an abandoned `map` leaves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from sslscale.errors import StageError
from sslscale.runtime import dispatch
from sslscale.runtime.dispatch import DispatchPool


def answer(result: Any = None, error: Exception | None = None) -> bytes:
    return pickle.dumps((result, error, "Traceback ...", 0))


class ScriptedPool(DispatchPool[int]):
    """Workers are numbers in the order they start; `script(worker, item)` is the answer, or None for a loss.

    Starts answer first, then items in the order they were given; those in `held` do not.
    """

    def __init__(self, workers: int, max_retries: int, script: Callable[[int, Any], bytes | None]) -> None:
        super().__init__(workers, max_retries)
        self.script, self.started = script, 0
        self.given: dict[int, Any] = {}
        self.log: list[tuple[int, Any]] = []
        self.held: set[Any] = set()

    def _start(self) -> int:
        self.started += 1
        self.given[self.started] = "start"
        return self.started

    def _publish(self, broadcast: Any) -> Any:
        return broadcast

    def _submit(self, worker: int, method: str, item: Any, published: Any) -> None:
        self.given[worker] = item
        self.log.append((worker, item))

    def _wait(self) -> tuple[int, bytes | None]:
        in_order = sorted(self.given.items(), key=lambda entry: entry[1] != "start")
        worker, item = next(entry for entry in in_order if entry[1] not in self.held)
        del self.given[worker]
        assert worker in self._busy
        return worker, self.script(worker, item)

    def _stop(self, worker: int) -> None:
        self.given.pop(worker, None)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(dispatch.time, "sleep", slept.append)
    return slept


def test_a_lost_item_is_the_next_to_be_given() -> None:
    with ScriptedPool(1, 1, lambda worker, item: None if (worker, item) == (1, 0) else answer(item)) as pool:
        assert list(pool.map("m", range(3))) == [(0, 0), (1, 1), (2, 2)]
        assert pool.log == [(1, 0), (2, 0), (2, 1), (2, 2)]


def test_retries_end_and_wait_longer_each_time(no_backoff: list[float]) -> None:
    with (
        ScriptedPool(2, 3, lambda worker, item: answer() if item == "start" else None) as pool,
        pytest.raises(StageError, match="lost at item 0"),
    ):
        list(pool.map("m", ["kills"]))
    assert [given for _, given in pool.log] == ["kills"] * 4
    assert no_backoff == pytest.approx([0.1, 0.2, 0.4])


def test_workers_that_cannot_start_end_in_an_error() -> None:
    with ScriptedPool(1, 2, lambda worker, item: None) as pool:
        with pytest.raises(StageError, match="before it was ready"):
            list(pool.map("m", [1]))
        assert pool.started == 3
        assert pool.log == []


def test_a_worker_that_starts_clears_the_count_of_failed_starts() -> None:
    def script(worker: int, item: Any) -> bytes | None:
        return None if (item == "start" and worker % 2) or (item != "start" and worker < 8) else answer(item)

    with ScriptedPool(1, 4, script) as pool:
        assert list(pool.map("m", [5])) == [(0, 5)]
        assert pool.started == 8


@pytest.mark.parametrize(
    "late", [answer("stale"), answer(error=ValueError("stale")), None], ids=["result", "error", "loss"]
)
def test_what_an_abandoned_map_still_answers_is_dropped(late: bytes | None) -> None:
    with ScriptedPool(2, 0, lambda worker, item: late if item == "slow" else answer(item)) as pool:
        pool.held = {"slow"}
        assert next(pool.map("m", ["slow", "quick"])) == (1, "quick")
        pool.held = set()
        assert sorted(pool.map("m", ["a", "b", "c"])) == [(0, "a"), (1, "b"), (2, "c")]
        assert pool.started == (3 if late is None else 2)


def test_ordered_results_run_ahead_of_the_slowest_by_two_items_a_worker() -> None:
    with ScriptedPool(2, 0, lambda worker, item: answer(item)) as pool:
        pool.held = {0}
        results = pool.map("m", range(9), ordered=True)
        with pytest.raises(RuntimeError, match="StopIteration"):  # nobody is left to answer: no more was given out
            next(results)
        assert [item for _, item in pool.log] == [0, 1, 2, 3]
    with ScriptedPool(2, 1, lambda worker, item: None if (worker, item) == (1, 0) else answer(item)) as pool:
        assert list(pool.map("m", range(9), ordered=True)) == [(item, item) for item in range(9)]


def test_an_error_leaves_the_pool_in_order() -> None:
    def script(worker: int, item: Any) -> bytes | None:
        return answer(error=KeyError("bad")) if item == "bad" else answer(item)

    with ScriptedPool(2, 0, script) as pool:
        with pytest.raises(KeyError, match="bad") as raised:
            list(pool.map("m", ["a", "bad", "b"]))
        assert "Traceback ..." in raised.value.__notes__[0]
        assert sorted(pool.map("m", ["c", "d"])) == [(0, "c"), (1, "d")]
