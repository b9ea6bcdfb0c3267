"""Restarts, sizes and stops of the driver, with groups that do as they are told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sslscale.config import PretrainConfig
from sslscale.errors import StageError
from sslscale.pretrain import restarts
from sslscale.pretrain.restarts import MOVE, OUTCOME, STOP, NoRoom, Restarts, largest


class ScriptedGroup:
    """Plays one act a run; `sizes` are the numbers of ranks that it was started with."""

    shares_process = False

    def __init__(self, folder: Path, *acts: Callable[[ScriptedGroup], None], room: int = 4) -> None:
        self.folder, self.acts, self.places, self.sizes = folder, list(acts), room, []

    def room(self) -> int:
        return self.places

    def spare(self) -> int:
        return self.places - self.sizes[-1]

    def run(self, settings, size):
        self.sizes.append(size)
        self.acts.pop(0)(self)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def finish(group: ScriptedGroup) -> None:
    write(group.folder / OUTCOME, {"finished": True, "result": {"steps": 9, "storage_retries": 0}})


def save_and_stop(group: ScriptedGroup) -> None:
    write(group.folder / OUTCOME, {"finished": False, "result": {}})


def lose(group: ScriptedGroup) -> None:
    raise RuntimeError("a rank is gone")


def checkpoint_and_lose(group: ScriptedGroup) -> None:
    write(group.folder / "checkpoints.json", {"checkpoints": [{"name": f"step-{len(group.sizes)}"}]})
    lose(group)


def find_no_room(group: ScriptedGroup) -> None:
    raise NoRoom


def stop_then_lose(group: ScriptedGroup) -> None:
    (group.folder / STOP).touch()
    lose(group)


def run(group: ScriptedGroup, **settings: object) -> dict | None:
    config = PretrainConfig(num_streams=4, global_batch=4, **settings)
    return Restarts(group.folder, config, group, lambda: None).until_done({})


def test_the_size_is_the_largest_allowed_one():
    assert [largest([1, 2, 4], most) for most in (0, 1, 3, 9)] == [1, 1, 2, 4]
    assert PretrainConfig(num_workers=[1, 4], num_streams=4).world_sizes == [1, 2, 4]


def test_lost_ranks_are_started_again_while_checkpoints_come(tmp_path):
    group = ScriptedGroup(tmp_path, *[checkpoint_and_lose] * 5, lose, lose, finish)
    result = run(group, max_restarts=3)
    assert result == {"steps": 9, "restarts": 7, "moves": 0}


def test_ranks_that_are_lost_again_and_again_end_the_run(tmp_path):
    group = ScriptedGroup(tmp_path, checkpoint_and_lose, *[lose] * 9)
    with pytest.raises(StageError, match="restarting them did not help"):
        run(group, max_restarts=2)
    assert len(group.sizes) == 3


def test_no_restart_at_all_where_none_is_allowed(tmp_path):
    group = ScriptedGroup(tmp_path, checkpoint_and_lose, finish)
    with pytest.raises(StageError):
        run(group, max_restarts=0)


def test_no_restart_after_a_stop_was_asked_for(tmp_path):
    group = ScriptedGroup(tmp_path, stop_then_lose, finish)
    with pytest.raises(StageError):
        run(group)


def test_a_group_that_finds_no_room_is_tried_smaller(tmp_path):
    group = ScriptedGroup(tmp_path, find_no_room, find_no_room, finish)
    assert run(group, num_workers=[1, 4])["restarts"] == 0 and group.sizes == [4, 2, 1]


def test_a_group_of_one_size_waits_for_its_room(tmp_path):
    group = ScriptedGroup(tmp_path, find_no_room, find_no_room, finish, room=0)
    assert run(group, num_workers=2)["steps"] == 9 and group.sizes == [2, 2, 2]


def test_ranks_move_when_there_is_room_for_more(tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "_LOOK_SECONDS", 0.0)

    def until_asked_to_move(group: ScriptedGroup) -> None:
        group.places = 2  # a node comes back
        while not (group.folder / MOVE).exists():
            time.sleep(0.01)
        save_and_stop(group)

    def full(group: ScriptedGroup) -> None:
        time.sleep(1.2)  # longer than the driver takes to look
        until_asked_to_move(group)

    group = ScriptedGroup(tmp_path, full, finish, room=1)
    assert run(group, num_workers=[1, 2])["moves"] == 1 and group.sizes == [1, 2]


def test_who_has_lost_the_run_asks_no_ranks_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(restarts.lease, "lost", lambda: True)
    with pytest.raises(KeyboardInterrupt), restarts.stop_on_signal(tmp_path / STOP):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert not (tmp_path / STOP).exists()


def test_a_stop_ends_without_a_result(tmp_path):
    def asked(group: ScriptedGroup) -> None:
        (group.folder / STOP).touch()
        save_and_stop(group)

    assert run(ScriptedGroup(tmp_path, asked)) is None
