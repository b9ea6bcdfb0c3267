"""The command line: verbs and their flags, no logic. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslscale import __version__
from sslscale.errors import EXIT_FAILED, EXIT_SIGINT, Interrupted, UserError

if TYPE_CHECKING:
    from sslscale.config import RunConfig

app = typer.Typer(
    help="Clusters, anomaly scores and a searchable index from unlabelled shards, by self-supervision.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="settings that override the config")
]
ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML file; default: the run directory's own config.yaml")
]
RunPath = Annotated[Path | None, typer.Option("--run", help="run directory")]
RuntimeName = Annotated[str | None, typer.Option("--runtime", help="local or ray")]
Address = Annotated[str | None, typer.Option(help="address of a Ray cluster; none starts one on this machine")]
Name = Annotated[str, typer.Option(help="name of the answer, so that one run can hold several")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what was made with other settings")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and the stages, and start nothing")]
Limit = Annotated[int | None, typer.Option(min=1, help="use at most so many samples of a dataset")]
Json = Annotated[bool, typer.Option("--json", help="the result as one JSON object on the last line of stdout")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="tracebacks, and the workers' own output")]


def _config(
    path: Path | None,
    run: Path | None,
    runtime: str | None,
    address: str | None,
    limit: int | None,
    overrides: list[str] | None,
) -> RunConfig:
    from sslscale.config import load_config

    if path is None and run is not None and (run / "config.yaml").is_file():
        path = run / "config.yaml"
    flags = {"run": run, "runtime.name": runtime, "runtime.address": address, "limit": limit}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return load_config(None if path is None else str(path), [*(overrides or []), *given])


def _stage_command(verb: str, help: str) -> None:
    """Adds the verb of one stage, or `run` for all of them."""

    def command(
        overrides: Overrides = None,
        config: ConfigFile = None,
        run: RunPath = None,
        runtime: RuntimeName = None,
        address: Address = None,
        name: Name = "main",
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        limit: Limit = None,
        as_json: Json = False,
        verbose: Verbose = False,
    ) -> None:
        from sslscale.pipeline import planned_stages, run_stages

        settings = _config(config, run, runtime, address, limit, overrides)
        stages = planned_stages(settings) if verb == "run" else [verb]
        if dry_run:
            _show_plan(settings, stages)
            return
        results = run_stages(
            stages, settings, name=name, overwrite=overwrite, command=" ".join(sys.argv[1:]), verbose=verbose
        )
        _show(verb, settings, results, as_json)

    app.command(verb, help=help)(command)


_stage_command("pack", "Write a source's samples into tar shards.")
_stage_command("pretrain", "Train a backbone by self-supervision.")
_stage_command("embed", "Run a backbone over shards, into feature parts.")
_stage_command("index", "Build a FAISS index over the features.")
_stage_command("cluster", "Cluster the features.")
_stage_command("anomaly", "Score every sample by its distance to its nearest neighbours.")
_stage_command("reduce", "Measure what compression keeps of the features, and map them in two dimensions.")
_stage_command("report", "Write the report of a run, one HTML file.")
_stage_command("run", "All stages that the config has a section for, in order.")


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="run directory")],
    key: Annotated[str, typer.Option(help="key of a sample that was embedded")],
    k: Annotated[int, typer.Option(min=1, help="how many")] = 10,
    dataset: Annotated[str | None, typer.Option(help="dataset of the key, where several have it")] = None,
    name: Name = "main",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The samples nearest to one that was embedded."""
    from sslscale.index.search import run_search
    from sslscale.rundir import RunDir

    rows = run_search(RunDir(run), key=key, k=k, name=name, dataset=dataset)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['distance']:.4f}  {row['dataset']}  {row['key']}")


@app.command()
def doctor(
    overrides: Overrides = None,
    config: ConfigFile = None,
    run: RunPath = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check this machine: packages, devices, disk, and a config's data where one is given."""
    from sslscale.doctor import run_doctor

    checks = run_doctor(_config(config, run, None, None, None, overrides))
    if as_json:
        _print_json([vars(check) for check in checks])
    else:
        for check in checks:
            typer.echo(f"{check.status:<5} {check.name:<16} {check.detail}")
            if check.fix:
                typer.echo(f"      {'':<16} fix: {check.fix}")
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(EXIT_FAILED)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _show_plan(config: RunConfig, stages: list[str]) -> None:
    from sslscale.config import dump_config

    typer.echo(dump_config(config), nl=False)
    typer.echo(f"# stages: {' -> '.join(stages)}")


def _show(verb: str, config: RunConfig, results: dict[str, Any], as_json: bool) -> None:
    from sslscale.report.summary import summary_lines

    if as_json:
        _print_json(results if verb == "run" else results[verb])
        return
    for line in summary_lines(config, results):
        typer.echo(line)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


def main() -> None:
    """The console script: turns errors into a few lines and an exit code."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    try:
        app()
    except UserError as error:
        _fail(f"error: {error}", error.exit_code, verbose)
    except Interrupted as error:
        _fail("interrupted: everything is saved; run the same command to go on", error.exit_code, False)
    except KeyboardInterrupt:
        _fail("interrupted: run the same command to go on", EXIT_SIGINT, False)
    except Exception as error:  # what nobody foresaw still ends in one line and exit 1
        _fail(
            f"error: {type(error).__name__}: {error}\n  fix:     run again with -v for the traceback",
            EXIT_FAILED,
            verbose,
        )


def _fail(message: str, code: int, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exc()
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
