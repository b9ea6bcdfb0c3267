"""What the command line prints when a command is done: one line a stage, with the numbers that matter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslscale import storage
from sslscale.config import RunConfig

_MEASURES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "silhouette": "silhouette"}
_NEXT = {"pack": "pretrain", "pretrain": "embed", "embed": "index", "cluster": "report", "anomaly": "report"}


def summary_lines(config: RunConfig, results: Mapping[str, Any]) -> list[str]:
    """The lines for `results`, each stage's own by its verb, in the order in which they ran.

    The last line is a command to try next, where there is one.
    """
    lines: list[str] = []
    for stage, result in results.items():
        if stage in _LINES:
            lines += [f"{stage:<10} {line}" for line in _LINES[stage](config, result)]
    if results.get("baselines"):
        lines += ["", *_comparison(results)]
    if "report" in results:
        lines += ["", f"report     {results['report']['path']}"]
    command = _next_command(config, list(results)[-1])
    return [*lines, f"next       {command}"] if command else lines


# ------------------------------------------------------------------ one stage


def _pack(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    assert config.pack is not None
    shards = sum(split["shards"] for split in result["splits"].values())
    skipped = [f"{count:,} {kind}" for kind, count in result.get("skipped", {}).items()]  # older pack.json have none
    passed_over = f" (skipped: {', '.join(skipped[:5])}{', ...' if len(skipped) > 5 else ''})" if skipped else ""
    return [f"{result['samples']:,} samples in {shards:,} shards, {config.pack.output}{passed_over}"]


def _pretrain(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    titles = {"rankme": "RankMe {:.1f}", "feature_std": "feature std {:.4f}", "knn_accuracy": "kNN {:.3f}"}
    measured = [text.format(result["measures"][key]) for key, text in titles.items() if key in result["measures"]]
    parts = [
        f"{result['samples_per_second']:,.0f} samples/s",
        f"{result['data_wait_share']:.1%} waiting for data",
        *measured,
        *([f"{_plural(result['bad_steps'], 'step')} skipped (not finite)"] if result["bad_steps"] else []),
    ]
    head = f"{_plural(result['steps'], 'step')} on {_plural(result['world_size'], 'rank')}, ZeRO {result['zero_stage']}"
    if "precision" in result:  # not in results of before it could be "auto"
        head += f", {result['precision']}"
    return [f"{head}: {'  '.join(parts)}" + _failed(result["failed"], f"{config.run}/pretrain")]


def _embed(config: RunConfig, results: Mapping[str, Any]) -> list[str]:
    return [
        f"{result['features_out']:,} features of {dataset}, {result['dim']} wide: "
        f"{result['samples_per_second']:,.0f} samples/s"
        + _failed(result["failed"], f"{config.run}/embed/{dataset}")
        + _bad_labels(result.get("bad_labels", 0))
        for dataset, result in results.items()
    ]


def _index(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    recall = result["recall_at_10"]
    measured = "" if recall is None else f"  recall@10 {recall:.3f}"
    return [f"{result['num_vectors']:,} vectors in {result['factory']}, {result['bytes'] / 2**20:,.1f} MiB{measured}"]


def _cluster(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    head = f"{result['num_samples']:,} samples in {_plural(result['num_clusters'], 'cluster')}"
    found = [f"{title} {result['measures'][key]:.3f}" for key, title in _MEASURES.items() if _known(result, key)]
    return [f"{head}: {'  '.join(found)}" if found else head]


def _anomaly(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    against = f"against {result['num_reference']:,}" if result["num_reference"] else "by the training objective"
    head = f"{result['num_samples']:,} samples scored {against}"
    titles = {"auroc": "AUROC", "average_precision": "average precision"}
    found = [f"{title} {result['measures'][key]:.3f}" for key, title in titles.items() if _known(result, key)]
    return [f"{head}: {'  '.join(found)}" if found else head]


def _reduce(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['method']:<10} {row['bytes_per_vector']:>6,} bytes a vector  recall@10 {row['recall_at_10']:.3f}"
        f"  re-ranked {row['recall_at_10_reranked']:.3f}"
        for row in result["table"]
    ]


def _dedup(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    found = f"{result['exact']:,} exact and {result['near']:,} near duplicates in {_plural(result['groups'], 'group')}"
    lists = [f"{dataset} without them: {path}" for dataset, path in result["lists"].items()]
    return [f"{result['num_samples']:,} samples, {found}", *lists]


_LINES = {
    "pack": _pack,
    "dedup": _dedup,
    "pretrain": _pretrain,
    "embed": _embed,
    "index": _index,
    "cluster": _cluster,
    "anomaly": _anomaly,
    "reduce": _reduce,
}


def _known(result: Mapping[str, Any], key: str) -> bool:
    return result["measures"][key] is not None


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _failed(count: int, stage: str) -> str:
    return f" ({count:,} failed, see {stage}/failed)" if count else ""


def _bad_labels(count: int) -> str:
    return f" ({_plural(count, 'sample')} without a label: the .cls is no 64-bit integer)" if count else ""


# ------------------------------------------------------------------ all stages


def _comparison(results: Mapping[str, Any]) -> list[str]:
    """The baselines' measures above this run's, by the same code."""
    rows = {**results["baselines"], **({"this run": results["cluster"]} if "cluster" in results else {})}
    width = max(len("features"), *map(len, rows))
    lines = [f"{'features':<{width}}" + "".join(f"{title:>12}" for title in _MEASURES.values())]
    for name, result in rows.items():
        cells = (f"{result['measures'][key]:.3f}" if _known(result, key) else "-" for key in _MEASURES)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _next_command(config: RunConfig, last: str) -> str | None:
    if last in _NEXT:
        return f"sslscale {_NEXT[last]} --run {shlex.quote(config.run)}"
    key = _indexed_key(storage.local_path(config.run))
    return None if key is None else f"sslscale search {shlex.quote(config.run)} --key {shlex.quote(key)}"


def _indexed_key(run: Path) -> str | None:
    """The key of a sample that the index `main` holds."""
    from sslscale.features.store import FeatureStore, row_id
    from sslscale.rundir import read_json

    index = run / "index" / "main" / "result.json"
    if not index.is_file():
        return None
    for dataset in read_json(index)["datasets"]:
        if not (run / "embed" / dataset / "features.json").is_file():  # embedding it again was interrupted
            continue
        store = FeatureStore.open(run / "embed" / dataset)
        for part in store.parts:
            if part.rows:
                return store.key_of(row_id(part.part, 0))
    return None
