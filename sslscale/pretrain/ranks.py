"""What runs in a rank's own process: its process group, the training loop, and what it leaves for the driver.

Ranks and driver meet in the run directory: ranks leave `outcome.json` (rank 0, at the end) and
`stacks/<start>/rank-<n>.txt` (where a rank was when it was lost), and look for `stop-requested` and `move-requested`.
"""

from __future__ import annotations

import datetime
import errno
import faulthandler
import os
import pickle
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sslscale.config import RunConfig, validate
from sslscale.errors import StageError, UserError
from sslscale.rundir import write_json
from sslscale.runtime.local import end_with_parent

if TYPE_CHECKING:
    from sslscale.pretrain.loop import RankResult

OUTCOME, STACKS = "outcome.json", "stacks"
STOP, MOVE = "stop-requested", "move-requested"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Watchdog:
    """Writes the stack of every thread to `file` where `feed` is not called for `seconds`, and then ends the process.

    That one clock covers every way to hang: in a collective, in a read, in the objective. The other ranks wait for
    this one and are at most a step's imbalance behind, so each writes its own stack. `ends` is off where the rank
    shares its process with the driver.
    """

    def __init__(self, file: TextIO, seconds: float, ends: bool) -> None:
        self.file, self.seconds, self.ends = file, seconds, ends

    def feed(self) -> None:
        faulthandler.dump_traceback_later(self.seconds, exit=self.ends, file=self.file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def run_rank(settings: dict[str, Any], notice: Callable[[], bool] = lambda: False) -> None:
    """One rank, inside an initialised torch.distributed. Raises UserError for what a restart cannot help.

    `notice` says whether this group's machines are about to be taken away; every rank calls it equally often.
    """
    folder = Path(settings["folder"])
    try:
        with _stack_file(Path(settings["stacks"])) as file:
            outcome = _train(folder, settings, notice, file)
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(folder / OUTCOME, {"finished": outcome.finished, "result": outcome.result})
    except OSError as error:
        if error.errno in _FULL:
            raise not_written(error, folder) from error
        raise


def _train(folder: Path, settings: dict[str, Any], notice: Callable[[], bool], file: TextIO) -> RankResult:
    config = validate(RunConfig, settings["config"])
    assert config.pretrain is not None
    watchdog = Watchdog(file, config.pretrain.collective_timeout_s, ends=not settings["shares_driver"])
    try:
        from sslscale.pretrain.loop import Trainer

        return Trainer(folder, config, settings["tools"], feed=watchdog.feed, notice=notice).train()
    except UserError:
        raise
    except Exception:
        traceback.print_exc(file=file)
        raise
    finally:
        watchdog.close()


def not_written(reason: object, folder: Path) -> StageError:
    """The error for a write that failed: how full the disk is, and that nothing good was lost."""
    usage = shutil.disk_usage(folder)
    return StageError(
        f"pretrain: a file could not be written: {reason}",
        got=f"{usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB are free where {folder} lies",
        fix="make room there and run the same command: it goes on from the last checkpoint, which is intact",
    )


def _stack_file(folder: Path) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"rank-{int(os.environ.get('RANK', '0')):05d}.txt").open("w")


def run_in_group(settings: dict[str, Any]) -> None:
    """`run_rank` inside a process group of its own: this process alone, or what torch's launcher describes."""
    import torch
    import torch.distributed as dist

    if not settings["shares_driver"]:
        threading.Thread(target=end_with_parent, daemon=True).start()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = settings["config"]["pretrain"]["device"] != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        timeout = datetime.timedelta(seconds=settings["config"]["pretrain"]["collective_timeout_s"])
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        run_rank(settings)
    except UserError as error:
        if not settings["shares_driver"]:
            Path(settings["error"]).write_bytes(pickle.dumps(error))
        raise
    finally:
        dist.destroy_process_group()
