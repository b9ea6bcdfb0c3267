"""Requests to a store: sent again while it or the network fails, with growing pauses, and counted."""

from __future__ import annotations

import errno
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sslscale.errors import StageError

PATIENCE_SECONDS = 120.0  # a request is given up after failing for so long
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 10.0

_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = (errno.EINVAL, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.EROFS)
_CONNECTION_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "IncompleteReadError"),
    ("botocore.parsers", "ResponseParserError"),
)

Result = TypeVar("Result")

_count = 0
_count_lock = threading.Lock()


def retries() -> int:
    """How many requests this process has sent again, with those of its workers."""
    return _count


def count_retries(number: int) -> None:
    """Adds what a worker, or a rank, of this process counted."""
    global _count
    with _count_lock:
        _count += number


def retrying(request: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`request(*args, **kwargs)`, sent again while store or network fail; StageError after PATIENCE_SECONDS."""
    begin, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            return request(*args, **kwargs)
        except Exception as error:
            if not _transient(error):
                raise
            if time.monotonic() - begin > PATIENCE_SECONDS:
                raise StageError(
                    f"the store has not answered for {PATIENCE_SECONDS:.0f} s",
                    got=f"{request.__name__} {args[0] if args else ''}: {error}",
                    fix="run the same command again once it does: what is finished is kept",
                ) from error
        count_retries(1)
        time.sleep(pause * random.uniform(0.5, 1.5))  # so that many workers do not come back at once
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _transient(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL) and error.errno not in _FINAL_NUMBERS
    loaded = [(sys.modules[module], name) for module, name in _CONNECTION_ERRORS if module in sys.modules]
    return isinstance(error, tuple(getattr(module, name) for module, name in loaded))
