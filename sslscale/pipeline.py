"""`sslscale run`: the stages in order over one run directory, and the table of stages that the CLI's verbs share."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from sslscale import lease
from sslscale.config import RunConfig, dump_config
from sslscale.errors import EXIT_SIGTERM, EXIT_USAGE, Interrupted, UserError
from sslscale.provenance import provenance
from sslscale.rundir import RunDir, hash_json, write_atomic
from sslscale.runtime.base import Runtime, make_runtime

# A stage takes (run, config, runtime, overwrite, name) and returns its result.
StageFunction = Callable[[RunDir, RunConfig, Runtime, bool, str], Any]


def _pack(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.shards.write import run_pack

    if config.pack is None:
        raise UserError("the config has no pack section", fix="add pack.source=NAME pack.output=DIR")
    return run_pack(config.pack, overwrite=overwrite)


def _pretrain(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.corpus import TOOLS
    from sslscale.pretrain.stage import run_pretrain

    return run_pretrain(run, config, runtime, TOOLS, overwrite=overwrite)


def _embed(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.embed.stage import run_embed

    return run_embed(run, config, runtime, overwrite=overwrite)


def _index(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.index.build import run_index

    return run_index(run, config, runtime, name=name, overwrite=overwrite)


def _cluster(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.cluster.stage import run_cluster

    return run_cluster(run, config, runtime, name=name, overwrite=overwrite)


def _anomaly(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.anomaly.stage import run_anomaly

    return run_anomaly(run, config, runtime, name=name, overwrite=overwrite)


def _reduce(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.reduce.stage import run_reduce

    return run_reduce(run, config, runtime, name=name, overwrite=overwrite)


def _dedup(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.dedup.stage import run_dedup

    return run_dedup(run, config, runtime, name=name, overwrite=overwrite)


def _baselines(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    """Each baseline is a run of its own inside this one: the same code over other features, not normalised."""
    results = {}
    embed, cluster = config.embed.model_copy(update={"normalize": False, "output": "pooled"}), config.cluster
    if cluster is not None and cluster.method == "objective":  # which baselines have none of
        cluster = cluster.model_copy(update={"method": "minibatch"})
    for backbone in config.baselines:
        with RunDir(run.path / "baselines" / backbone) as inner:
            theirs = config.model_copy(
                update={"embed": embed.model_copy(update={"backbone": backbone}), "cluster": cluster}
            )
            _embed(inner, theirs, runtime, overwrite, name)
            results[backbone] = _cluster(inner, theirs, runtime, overwrite, name)
    return results


def _report(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.report.render import run_report

    return run_report(run, config, name=name)


STAGES: dict[str, StageFunction] = {
    "pack": _pack,
    "dedup": _dedup,
    "pretrain": _pretrain,
    "embed": _embed,
    "index": _index,
    "cluster": _cluster,
    "anomaly": _anomaly,
    "reduce": _reduce,
    "baselines": _baselines,
    "report": _report,
}


def planned_stages(config: RunConfig) -> list[str]:
    """The stages that `run` goes through: those that the config has a section for."""
    return [stage for stage in STAGES if getattr(config, stage)]


def run_stages(
    stages: list[str],
    config: RunConfig,
    *,
    name: str = "main",
    overwrite: bool = False,
    command: str = "run",
    verbose: bool = False,
) -> dict[str, Any]:
    """Runs these stages in order; returns each one's result. The run directory is held meanwhile."""
    runtime = make_runtime(
        config.runtime.name, address=config.runtime.address, max_retries=config.runtime.max_retries, verbose=verbose
    )
    results: dict[str, Any] = {}
    changed = False

    def begin() -> None:
        nonlocal changed
        changed = True
        _record_start(run, config, command)

    with RunDir(config.run) as run, _sigterm_interrupts():
        run.on_start = begin
        try:
            for stage in stages:
                results[stage] = STAGES[stage](run, config, runtime, overwrite, name)
                run.record(counts={stage: _counts(results[stage])})
        except BaseException as error:
            refused = isinstance(error, UserError) and error.exit_code == EXIT_USAGE
            if (changed or not refused) and not lease.lost():  # what is refused at once leaves the run as it was
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                with contextlib.suppress(OSError):  # a full disk must not hide what it led to
                    run.record(status="interrupted" if stopped else "failed")
            raise
        finally:
            runtime.close()
        run.record(status="done")
    return results


def _record_start(run: RunDir, config: RunConfig, command: str) -> None:
    write_atomic(run.path / "config.yaml", dump_config(config))
    record = {**provenance(), "command": command, "config_hash": hash_json(config.identity())}
    run.record(**record, seeds={"run": config.seed}, status="running")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the work as an interrupt from the keyboard does: what is finished stays, the lease is given back."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise Interrupted(EXIT_SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _counts(result: Any) -> Any:
    """The numbers of samples in a result, however deep; what the manifest keeps of it."""
    names = ("samples", "samples_in", "features_out", "failed", "num_vectors", "num_samples")
    if not isinstance(result, dict):
        return None
    found = {name: result[name] for name in names if isinstance(result.get(name), int)}
    return found or {key: counts for key, value in result.items() if (counts := _counts(value))}
