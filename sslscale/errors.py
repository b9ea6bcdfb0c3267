"""Errors that a user sees: what is wrong, what was given, what is allowed, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class UserError(ValueError):
    """Something the user can put right: the command or the config is wrong, and nothing was started (exit 2).

    Every part but `what` is optional; each becomes one line of the message.
    """

    exit_code = EXIT_USAGE

    def __init__(self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.what]
        if self.got is not None:
            lines.append(f"  got:     {self.got}")
        if self.allowed is not None:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix is not None:
            lines.append(f"  fix:     {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):  # errors cross process boundaries (Ray, spawned workers) with their parts intact
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.fix)


class StageError(UserError):
    """A stage started and could not finish (exit 1)."""

    exit_code = EXIT_FAILED


class Interrupted(Exception):
    """A stage stopped on a signal after saving; the same command continues it."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"interrupted (exit {exit_code})")


def _rebuild(cls: type[UserError], what: str, got: object, allowed: object, fix: str | None) -> UserError:
    return cls(what, got=got, allowed=allowed, fix=fix)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def missing_package(package: str, extra: str | None = None) -> UserError:
    """The error for an optional package that is not installed, with the exact install line."""
    line = f"pip install 'sslscale[{extra}]'" if extra else f"pip install {package}"
    return UserError(f"the package {package!r} is needed for this and is not installed", fix=line)
