"""What verbs share on the command line: their options, and what these say together."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslscale import storage
from sslscale.errors import UserError
from sslscale.rundir import check_name

if TYPE_CHECKING:
    from sslscale.config import RunConfig
    from sslscale.runtime.base import Runtime


class RuntimeKind(StrEnum):
    local = "local"
    ray = "ray"


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="settings that override the config")
]
ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML file; default: the run directory's own config.yaml")
]
RunPath = Annotated[str | None, typer.Option("--run", help="run directory: a path or a URL")]
WorkRuntime = Annotated[RuntimeKind | None, typer.Option("--runtime", help="where work runs")]
Address = Annotated[
    str | None, typer.Option(help="address of a Ray cluster, and so --runtime ray; none starts one on this machine")
]
Name = Annotated[str, typer.Option(callback=check_name, help="name of the answer, so that one run can hold several")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what was made with other settings")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and the stages, and start nothing")]
Limit = Annotated[int | None, typer.Option(min=1, help="read at most so many samples of a dataset")]
Json = Annotated[bool, typer.Option("--json", help="the result as one JSON object on the last line of stdout")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="tracebacks, and the workers' own output")]


def config_of(
    path: Path | None,
    run: str | None,
    overrides: list[str] | None,
    more: Mapping[str, object] | None = None,
    *,
    runtime: RuntimeKind | None = None,
    address: str | None = None,
) -> RunConfig:
    """The config of a command: of its file, or of the run's own, under what else it says.

    `more` are settings that other flags give, by key; None: not given.
    """
    from sslscale.config import load_config

    if path is None and run is not None:
        own = storage.bring(storage.local_path(run) / "config.yaml")
        path = own if own.is_file() else None
    given = {"run": run, "runtime.name": _runtime_name(runtime, address), "runtime.address": address}
    flags = {key: value for key, value in {**given, **(more or {})}.items() if value is not None}
    return load_config(None if path is None else str(path), overrides or [], flags)


def _runtime_name(runtime: RuntimeKind | None, address: str | None) -> str | None:
    """The runtime that the flags ask for: an address is one of Ray's."""
    if address is not None and runtime == "local":
        raise UserError("--runtime local has no --address", got=address, fix="leave one of them out")
    return "ray" if address is not None else runtime and runtime.value


def runtime_of(runtime: RuntimeKind | None, address: str | None, verbose: bool) -> Runtime:
    """Where a command that has no config works: here, unless it says otherwise."""
    from sslscale.runtime.base import make_runtime

    return make_runtime(_runtime_name(runtime, address) or "local", address=address, verbose=verbose)


def refuse(needed: str, **given: object) -> None:
    """UserError for an option that is given and would have no effect."""
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect here", got=value, fix=f"it goes with {needed} only"
            )
