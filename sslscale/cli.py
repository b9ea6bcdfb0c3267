"""The command line: verbs and their flags, no logic. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslscale import __version__, storage
from sslscale.errors import EXIT_FAILED, Interrupted, UserError
from sslscale.options import (
    Address,
    ConfigFile,
    DryRun,
    Json,
    Limit,
    Name,
    Overrides,
    Overwrite,
    RunPath,
    RuntimeKind,
    Verbose,
    WorkRuntime,
    config_of,
    refuse,
    runtime_of,
)
from sslscale.rundir import MAIN, NAMED

if TYPE_CHECKING:
    from sslscale.config import RunConfig

app = typer.Typer(
    help="Clusters, anomaly scores and a searchable index from unlabelled shards, by self-supervision.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_OF_FEATURES = ("index", "cluster", "anomaly", "reduce", "report")  # they read no samples


def _stage_command(verb: str, help: str) -> None:
    """Adds the verb of one stage, or `run` for all of them. All take the same options."""

    def command(
        overrides: Overrides = None,
        config: ConfigFile = None,
        run: RunPath = None,
        runtime: WorkRuntime = None,
        address: Address = None,
        name: Name = MAIN,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        limit: Limit = None,
        as_json: Json = False,
        verbose: Verbose = False,
    ) -> None:
        from sslscale.pipeline import planned_stages, preflight, run_stages

        if name != MAIN and verb not in (*NAMED, "run", "report"):
            refuse(", ".join(NAMED), name=name)
        limited = "pack.limit" if verb == "pack" else "limit"
        settings = config_of(config, run, overrides, {limited: limit}, runtime=runtime, address=address)
        if limit is not None and verb in _OF_FEATURES:
            typer.echo(f"--limit is of samples that are read: {verb} takes all that are embedded", err=True)
        stages = planned_stages(settings) if verb == "run" else [verb]
        if dry_run:
            preflight(stages, settings, name)
            _show_plan(settings, stages, as_json)
            return
        results = run_stages(
            stages, settings, name=name, overwrite=overwrite, command=shlex.join(sys.argv[1:]), verbose=verbose
        )
        _show(verb, settings, results, as_json)

    app.command(verb, help=help)(command)


_stage_command("pack", "Write a source's samples into tar shards.")
_stage_command("dedup", "Find samples that are duplicates, and list the shards without them.")
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
    run: Annotated[str, typer.Argument(help="run directory: a path or a URL")],
    key: Annotated[str | None, typer.Option(help="key of a sample that was embedded")] = None,
    query: Annotated[Path | None, typer.Option(help="an image, or a .npy file of vectors")] = None,
    queries: Annotated[str | None, typer.Option(help="shards, each sample of which is a query")] = None,
    output: Annotated[str | None, typer.Option(help="Parquet file of what --queries finds, a path or a URL")] = None,
    k: Annotated[int, typer.Option(min=1, help="how many")] = 10,
    where: Annotated[str | None, typer.Option(help="filter, such as \"split = 'train' and label >= 3\"")] = None,
    dataset: Annotated[str | None, typer.Option(help="dataset of the key, where several have it")] = None,
    runtime: Annotated[RuntimeKind | None, typer.Option("--runtime", help="where --queries are embedded")] = None,
    address: Address = None,
    workers: Annotated[int | None, typer.Option(min=1, help="that embed --queries")] = None,
    name: Name = MAIN,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The samples nearest to one that was embedded, to an image, to vectors, or to each sample of some shards."""
    from sslscale.index.query import run_search, search_shards
    from sslscale.rundir import RunDir

    if queries is not None:
        refuse("a search without --queries", key=key, query=query, dataset=dataset)
        if output is None:
            raise UserError("there is no place for what is found", fix="--output FILE.parquet")
        held, place = RunDir.reading(run), storage.local_path(output)
        with closing(runtime_of(runtime, address, verbose)) as pools:
            found = search_shards(
                held, pools, queries=queries, output=place, k=k, where=where, name=name, workers=workers or 1
            )
        _print_json(found)
        return
    refuse("--queries", output=output, runtime=runtime and runtime.value, address=address, workers=workers)
    if key is None:
        refuse("--key", dataset=dataset)
    rows = run_search(RunDir.reading(run), key=key, query=query, k=k, where=where, name=name, dataset=dataset)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['distance']:.4f}  {row['dataset']}  {row['key']}")


@app.command()
def delete(
    run: Annotated[str, typer.Argument(help="run directory: a path or a URL")],
    keys: Annotated[Path, typer.Option(help="file of the samples' keys, one a line", exists=True, dir_okay=False)],
    dataset: Annotated[str | None, typer.Option(help="dataset of the keys, where several have them")] = None,
    name: Name = MAIN,
    verbose: Verbose = False,
) -> None:
    """Take samples out of an index: no search returns them any more. `compact` frees their space."""
    from sslscale.index.search import Index
    from sslscale.rundir import RunDir

    with RunDir(run) as held:
        deleted = Index.open(held, name).delete([key for key in keys.read_text().splitlines() if key], dataset)
    typer.echo(f"{deleted:,} deleted from index {name}")


@app.command()
def compact(
    run: Annotated[str, typer.Argument(help="run directory: a path or a URL")],
    runtime: WorkRuntime = None,
    address: Address = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    name: Name = MAIN,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Build an index again without what was deleted from it."""
    from sslscale.index.build import compact_index
    from sslscale.rundir import RunDir

    with RunDir(run) as held, closing(runtime_of(runtime, address, verbose)) as pools:
        result = compact_index(held, pools, name=name, workers=workers)
    typer.echo(json.dumps(result) if as_json else f"{result['num_vectors']:,} vectors, {result['bytes']:,} bytes")


@app.command()
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    run: RunPath = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="ranks; none: the config's own")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="ranks on one machine; none: 8")] = None,
    link: Annotated[float | None, typer.Option(help="GB/s between two ranks of a machine; none: 100")] = None,
    network: Annotated[float, typer.Option(help="GB/s of one machine's network")] = 50.0,
    store: Annotated[float, typer.Option(help="GB/s of the shards' store, to all machines")] = 20.0,
    vectors: Annotated[
        str | None, typer.Option(metavar="NxD", help="plan k-means over so many vectors instead")
    ] = None,
    matrix: Annotated[float | None, typer.Option(help="TFLOP/s of a device, for k-means; none: measured here")] = None,
    memory: Annotated[float | None, typer.Option(help="GB/s of its memory, for k-means; none: measured here")] = None,
    limit: Limit = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What a training will read, write, hold and take, from a short measurement; the bandwidths are yours to state.

    With --vectors 1000000000x384, the same of k-means with cluster.num_clusters.
    """
    from dataclasses import asdict

    from sslscale.plan.model import Machine

    settings = config_of(config, run, overrides, {"limit": limit})
    if vectors is None:
        refuse("--vectors", matrix=matrix, memory=memory)
    else:
        refuse("the plan of a training", gpus=gpus, ranks_per_node=ranks_per_node, link=link, limit=limit)
    machine = Machine(ranks_per_node or 8, (100.0 if link is None else link) * 1e9, network * 1e9, store * 1e9)
    if vectors is not None:
        from sslscale.plan.clustering import clustering_lines, run_clustering_plan

        rates = {"matrix": matrix and matrix * 1e12, "memory": memory and memory * 1e9}
        result = run_clustering_plan(settings, vectors, machine, **rates)
        lines = clustering_lines(result)
    else:
        from sslscale.pipeline import preflight
        from sslscale.plan.stage import plan_lines, run_plan

        preflight(["pretrain"], settings)
        found = run_plan(settings, machine, ranks=gpus)
        result, lines = asdict(found), plan_lines(found)
    if as_json:
        _print_json(result)
        return
    for line in lines:
        typer.echo(line)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="run directory: a path or a URL")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What a run has done, does and has lost; another process may be at work on it."""
    from dataclasses import asdict

    from sslscale.status import run_status

    found = run_status(run)
    if as_json:
        _print_json(asdict(found))
        return
    for line in found.lines():
        typer.echo(line)


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- VERB ...", help="what to run there, after --")],
    address: Annotated[str, typer.Option(help="the cluster's dashboard")] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="folder that the job gets a copy of")] = Path(),
    no_wait: Annotated[bool, typer.Option("--no-wait", help="return once the job is accepted")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a command on a Ray cluster, as a job: its output streams, and its exit code is this one's."""
    from sslscale.runtime.address import use_token

    use_token()
    from sslscale.runtime.submit import submit as submit_job

    raise typer.Exit(submit_job(command, address=address, folder=working_dir, wait=not no_wait))


features_app = typer.Typer(help="What was embedded: a summary, and files for other tools.", no_args_is_help=True)
app.add_typer(features_app, name="features")


@features_app.command("info")
def features_info(
    run: Annotated[str, typer.Argument(help="run directory")], as_json: Json = False, verbose: Verbose = False
) -> None:
    """Rows, dimension, type and backbone of each embedded dataset."""
    from sslscale.index.export import describe_features
    from sslscale.rundir import RunDir

    described = describe_features(RunDir.reading(run))
    if as_json:
        _print_json(described)
        return
    for dataset, facts in described.items():
        typer.echo(dataset)
        for name, value in facts.items():
            typer.echo(f"  {name:<11} {', '.join(value) if isinstance(value, list) else value}")


@features_app.command("export")
def features_export(
    run: Annotated[str, typer.Argument(help="run directory")],
    format: Annotated[str, typer.Option(help="parquet, npy, lance or viewer")],
    output: Annotated[str, typer.Option(help="folder of the files, a path or a URL")],
    dataset: Annotated[str | None, typer.Option(help="one dataset; none: all")] = None,
    runtime: Annotated[
        RuntimeKind | None, typer.Option("--runtime", help="where a viewer's neighbours are found")
    ] = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Write the features as Parquet, npy or Lance, or with the neighbours that an embedding viewer reads."""
    from sslscale.index.export import export_features
    from sslscale.rundir import RunDir

    if format != "viewer":
        refuse("--format viewer", runtime=runtime and runtime.value, address=address)
    with ExitStack() as stack:
        # Only a viewer writes into the run: its neighbours.
        held = stack.enter_context(RunDir(run)) if format == "viewer" else RunDir.reading(run)
        workers = stack.enter_context(closing(runtime_of(runtime, address, verbose)))
        place = storage.local_path(output)
        for path in export_features(held, workers, format=format, output=place, dataset=dataset):
            typer.echo(storage.shown(path))


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

    checks = run_doctor(config_of(config, run, overrides))
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


def _show_plan(config: RunConfig, stages: list[str], as_json: bool) -> None:
    from sslscale.config import dump_config

    if as_json:
        _print_json({"config": config.model_dump(mode="json"), "stages": stages})
        return
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
        _fail("interrupted: what is finished is kept; run the same command to go on", error.exit_code, False)
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
