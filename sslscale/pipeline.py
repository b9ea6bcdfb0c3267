"""`sslscale run`: the stages in order over one run directory, and the table of stages that the CLI's verbs share.

RUN/config.yaml is that of the first command. A later one puts in its place the sections of the stages that it changes,
with the datasets that it names; an answer under a name of its own leaves no trace there: its settings are in its
stage.json. seed, limit, runtime and storage stay those of the first.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sslscale import lease, storage
from sslscale.config import RunConfig
from sslscale.config.load import check_dataset, dump_sections, plain_sections, read_sections
from sslscale.errors import EXIT_SIGINT, EXIT_SIGTERM, EXIT_USAGE, Interrupted, UserError, did_you_mean
from sslscale.provenance import provenance
from sslscale.rundir import MAIN, NAMED, RunDir, check_name, hash_json, read_json, write_atomic
from sslscale.runtime.base import Runtime, make_runtime

# A stage takes (run, config, runtime, overwrite, name) and returns its result.
StageFunction = Callable[[RunDir, RunConfig, Runtime, bool, str], Any]


def _pack(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.shards.write import run_pack

    if config.pack is None:
        raise UserError("the config has no pack section", fix="add pack.source=NAME pack.output=DIR")
    return run_pack(config.pack, overwrite=overwrite, part_of=run)


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
    """Each baseline is a run of its own inside this one."""
    results = {}
    for backbone in config.baselines:
        with RunDir(run.path / "baselines" / _folder_name(backbone), part_of=run) as inner:
            theirs = _of_baseline(config, backbone)
            _embed(inner, theirs, runtime, overwrite, name)
            results[backbone] = _cluster(inner, theirs, runtime, overwrite, name)
    return results


def _of_baseline(config: RunConfig, backbone: str) -> RunConfig:
    """The same code over features of another backbone, as they are: not normalised, not projected."""
    as_they_are = {"backbone": backbone, "normalize": False, "output": "pooled", "pca": None}
    cluster = config.cluster
    if cluster is not None and cluster.method == "objective":  # which baselines have none of
        cluster = cluster.model_copy(update={"method": "minibatch"})
    return config.model_copy(update={"embed": config.embed.model_copy(update=as_they_are), "cluster": cluster})


def _folder_name(backbone: str) -> str:
    """A backbone's name as that of a folder: of a path or a URL what can be read of it, and a hash."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:-]*", backbone):
        return backbone
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', backbone).strip('-')[-40:]}-{hash_json(backbone)[:8]}"


def _report(run: RunDir, config: RunConfig, runtime: Runtime, overwrite: bool, name: str) -> Any:
    from sslscale.report.render import run_report

    return run_report(run, config, name=name)


# In the order in which `run` goes through them.
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


_NEEDS = {"baselines": "cluster"}  # which they are there to be compared with


def planned_stages(config: RunConfig) -> list[str]:
    """The stages that `run` goes through: those that the config has a section for."""
    return [stage for stage in STAGES if getattr(config, stage) and getattr(config, _NEEDS.get(stage, stage))]


def run_stages(
    stages: list[str],
    config: RunConfig,
    *,
    name: str = MAIN,
    overwrite: bool = False,
    command: str = "run",
    verbose: bool = False,
) -> dict[str, Any]:
    """Runs these stages in order; returns each one's result. The run directory is held meanwhile.

    Raises Interrupted on Ctrl-C and SIGTERM (what is finished is kept), and UserError (exit 2) of `preflight` before
    anything is written.
    """
    preflight(stages, config, name)
    runtime = make_runtime(
        config.runtime.name, address=config.runtime.address, max_retries=config.runtime.max_retries, verbose=verbose
    )
    results: dict[str, Any] = {}
    begun: list[str] = []

    def begin(folder: Path) -> Mapping[str, Any]:
        inside = folder.is_relative_to(run.path)  # shards lie where the config says
        begun.append((folder.relative_to(run.path) if inside else folder).as_posix())
        return _record_start(run, config, stage, name, command, begun)

    with RunDir(config.run) as run, _sigterm_interrupts():
        run.on_start = begin
        before = _recorded_status(run)
        try:
            for stage in stages:
                results[stage] = STAGES[stage](run, config, runtime, overwrite, name)
                if not (run.path / "config.yaml").is_file():  # all was there already, made by another run
                    _record_start(run, config, stage, name, command, begun)
                run.record(counts={stage: _counts(results[stage])})
        except BaseException as error:
            refused = isinstance(error, UserError) and error.exit_code == EXIT_USAGE
            if (begun or not refused) and not lease.lost():  # what is refused at once leaves the run as it was
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                with contextlib.suppress(OSError):  # a full disk must not hide what it led to
                    run.record(status="interrupted" if stopped else "failed")
            if isinstance(error, KeyboardInterrupt) and not lease.lost():
                raise Interrupted(EXIT_SIGINT) from None
            raise
        finally:
            runtime.close()
        run.record(status=_status(run, before))
    return results


# ------------------------------------------------------------------ what is wrong before anything starts


def preflight(stages: Iterable[str], config: RunConfig, name: str = MAIN) -> None:
    """Raises what one of the stages would refuse by its settings alone, before an earlier one takes its hours.

    Each check is the stage's own. Nothing is written, and no samples are read.
    """
    check_name(name)
    stages, width = list(stages), None  # of the features that will be made, where the settings say it
    if "dedup" in stages and config.dedup is not None:
        for dataset in config.dedup.datasets or ():
            check_dataset(config, dataset)
    if "pretrain" in stages and config.pretrain is not None:
        from sslscale.pretrain.stage import check_settings

        objective = check_settings(config)
        if config.embed.backbone == "pretrain":
            width = objective.backbone.feature_dim if config.embed.output == "pooled" else None
            _check_given(config, stages, objective.further_outputs)
    if "embed" in stages:
        for dataset in config.embed.datasets:
            check_dataset(config, dataset)
        if stages[0] != "embed" and not (config.embed.backbone == "pretrain" and "pretrain" in stages):
            _check_backbone(config)
        if config.embed.pca is not None and width is not None:
            from sslscale.embed.stage import check_pca

            check_pca(config.embed.pca, width)
    if "baselines" in stages:
        for backbone in config.baselines:
            _check_backbone(_of_baseline(config, backbone))
    for stage in ("index", "cluster", "anomaly", "reduce"):
        section = getattr(config, stage) if stage in stages else None
        if section is not None:
            _check_embedded(config, [*(section.datasets or ()), *(getattr(section, "reference", None) or ())])
    if "index" in stages and config.index is not None:
        _check_factory(config.index.factory, config.embed.pca or width)
    if "reduce" in stages and config.reduce is not None:
        from sslscale.reduce.maps import check_method

        check_method(config.reduce.map)
    if stages == ["report"]:
        _check_answers(config.run, name)


def _check_given(config: RunConfig, stages: Collection[str], outputs: Collection[str]) -> None:
    """UserError for an answer that is to be the objective's own, where it gives none."""
    for stage, wanted in (("cluster", "cluster_probs"), ("anomaly", "score")):
        section = getattr(config, stage) if stage in stages else None
        if section is not None and section.method == "objective" and wanted not in outputs:
            assert config.pretrain is not None
            raise UserError(
                f"{stage}.method=objective takes what the pretraining objective gives, and it gives no {wanted}",
                got=f"pretrain.objective.name={config.pretrain.objective['name']}",
                fix=f"set another {stage}.method, or pretrain with an objective that gives it",
            )


def _check_backbone(config: RunConfig) -> None:
    from sslscale.embed.stage import find_backbone

    find_backbone(RunDir.reading(config.run), config)


def _check_embedded(config: RunConfig, datasets: Iterable[str]) -> None:
    """UserError for a dataset that neither is embedded nor will be by this config."""
    from sslscale.features.sets import check_embedded, embedded_datasets

    if unknown := [dataset for dataset in datasets if dataset not in config.embed.datasets]:
        check_embedded(unknown, [*config.embed.datasets, *embedded_datasets(RunDir.reading(config.run))])


def _check_factory(factory: str, dim: int | None) -> None:
    """`dim` is None where only the features themselves will say it."""
    from sslscale.index.factory import empty_index

    if factory != "auto" and dim is not None:
        empty_index(factory, dim)


def _check_answers(location: str, name: str) -> None:
    """UserError where a report would show nothing."""
    found = sorted(RunDir.reading(location).answers())
    if not found:
        raise UserError("there is no run to report on", got=location, fix="give --run the folder or URL of a run")
    if name not in found:
        raise UserError(
            f"this run has no answers of this name{did_you_mean(name, found)}", got=name, allowed=", ".join(found)
        )


# ------------------------------------------------------------------ what is recorded of a command


def _record_start(
    run: RunDir, config: RunConfig, stage: str, name: str, command: str, begun: list[str]
) -> dict[str, Any]:
    """Records the command in the run, with the stages it has begun; returns what a stage is to keep of it."""
    _record_config(run, config, stage, name)
    made = {**provenance(), "command": command}
    settings = {"config_hash": hash_json(config.identity()), "seeds": {"run": config.seed}}
    run.record(**made, **settings, status="running", begun=begun)
    return {key: made[key] for key in ("command", "time", "git_commit")}


def _record_config(run: RunDir, config: RunConfig, stage: str, name: str) -> None:
    file, ours = run.path / "config.yaml", plain_sections(config)
    if storage.bring(file).is_file():
        if name != MAIN and stage in (*NAMED, "baselines"):
            return
        kept = read_sections(file)
        ours = {**kept, stage: ours[stage], "datasets": {**(kept.get("datasets") or {}), **ours["datasets"]}}
    write_atomic(file, dump_sections(ours))


def _recorded_status(run: RunDir) -> str | None:
    file = run.path / "manifest.json"
    return read_json(file).get("status") if file.is_file() else None


def _status(run: RunDir, before: str | None) -> str:
    """done where every stage is; else how the run was left before this command, which did not mend that."""
    if all((stage / "result.json").is_file() for stage in run.stages()):
        return "done"
    return before if before not in (None, "done") else "interrupted"


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
