"""`sslscale report`: one self-contained HTML file of a run.

report/index.html          of the answers called `main`
report/<name>/index.html   of those of another name

Everything is inside it: styles, charts, pictures; nothing is loaded and no script runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sslscale import storage
from sslscale.config import ReportConfig, RunConfig
from sslscale.report.charts import bar_chart, line_chart, means, scatter_chart
from sslscale.report.collect import Anomalies, Clustering, Curve, RunReport, collect
from sslscale.report.reduction import Reduction
from sslscale.rundir import FORMAT_VERSION, MAIN, RunDir, read_json, write_atomic, write_json

NOTHING = "–"

# metric -> (title, what to look for), in the order of the page; others follow under their own names
CURVES = {
    "loss": ("Loss", "of the pretext task"),
    "lr": ("Learning rate", ""),
    "accuracy": ("Pretext accuracy", "on training views"),
    "feature_std": ("Feature std, training", "of what the loss sees; 0 is collapse"),
    "eval_rankme": ("RankMe", "effective rank of the features; a fall is collapse"),
    "eval_feature_std": ("Feature std", "of held-still samples; 0 is collapse"),
    "eval_knn_accuracy": ("kNN probe", "accuracy on held-out labels"),
    "samples_per_second": ("Throughput", "samples a second, mean so far"),
    "data_wait_share": ("Data wait", "share of the time spent waiting for data"),
}
SHARES = frozenset(("accuracy", "eval_knn_accuracy", "data_wait_share"))

# measure -> (title, what to look for)
LABEL_MEASURES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "purity": "Purity"}
FREE_MEASURES = {"silhouette": "Silhouette", "davies_bouldin": "Davies–Bouldin", "imbalance": "Imbalance"}

# what chooses between clusterings without a label -> (title, what to look for)
SELECTION = {
    "held_out_loss": ("Held-out loss", "of the objective; lower is better, and what its heads are chosen by"),
    "agreement": ("Agreement of starts", "AMI of the chosen head's clusters and the other heads'; 1 is the same ones"),
    "clusters_used": ("Clusters used", "exp of the entropy of their shares; 1 is a collapse"),
    "bits_saved": ("Bits saved", "a held-out task, against a single expert of as many parameters"),
    "silhouette": ("Silhouette", "higher is better"),
}

# what a line of a sweep over the number of clusters says -> (title, what to look for)
SWEEP = {
    "objective": ("Objective", "falls with every cluster: look for a knee"),
    "silhouette": ("Silhouette", "higher is better"),
    "davies_bouldin": ("Davies–Bouldin", "lower is better"),
    "stability_seeds": ("Stability over seeds", "ARI; 1 is the same clusters every time"),
    "stability_halves": ("Stability over halves", "ARI; 1 is the same clusters from either half"),
}


def run_report(run: RunDir, config: RunConfig, *, name: str = "main") -> dict[str, Any]:
    """Writes the page of the answers called `name`, and returns the result.json beside it: `path, bytes, ...`.

    Stages that were not run are absent from the page. It is made anew at every call.
    """
    report = collect(run, config, name)
    page = render(report, config)
    path = run.stage_path("report", None if name == MAIN else name) / "index.html"
    write_atomic(path, page)
    result = {
        "format_version": FORMAT_VERSION,
        "path": storage.shown(path),
        "name": name,
        "bytes": len(page.encode()),
        "failed": sum(failures.count for failures in report.failures),
        "counts_add_up": all(count.adds_up for count in report.counts),
    }
    write_json(path.with_name("result.json"), result)
    return read_json(path.with_name("result.json"))


def render(report: RunReport, config: RunConfig) -> str:
    """The page. Every value is escaped; only the charts are markup already."""
    environment = Environment(
        loader=PackageLoader("sslscale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, measure=measure, percent=percent, number=number, score=score, size=size)
    settings = config.report or ReportConfig()
    return environment.get_template("report.html").render(
        report=report,
        title=settings.title or PurePosixPath(report.run).name,
        facts=facts(report),
        curves=[_curve(curve) for curve in _ordered(report)],
        label_measures=LABEL_MEASURES,
        free_measures=FREE_MEASURES,
        measured=_measured(report),
        selection=_selection(report),
        warnings=_warnings(report, settings),
        size_chart=report.clustering and _size_chart(report.clustering),
        sweep=[] if report.clustering is None else _sweep(report.clustering.result.get("sweep", [])),
        map_chart=report.reduction and _map_chart(report.reduction),
        score_chart=report.anomalies and _score_chart(report.anomalies),
        settings=yaml.safe_dump(report.settings, sort_keys=False, width=120),
    )


# ------------------------------------------------------------------ numbers as text


def count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def measure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """One decimal, and never 0 % for something that is there."""
    if value is None:
        return NOTHING
    return "<\u00a00.1\u00a0%" if 0 < value < 0.0005 else f"{100 * value:.1f}\u00a0%"


def score(value: float) -> str:
    """Four significant digits, without an exponent where that stays short: a column of them lines up."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.2e}"


def number(value: float) -> str:
    """At most four significant digits: a figure on its own."""
    text = score(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def size(value: float) -> str:
    """Bytes in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


# ------------------------------------------------------------------ what the template is given


def facts(report: RunReport) -> list[tuple[str, str, str]]:
    """The key numbers of the page's head: (value, name, remark)."""
    found: list[tuple[str, str, str]] = []
    if report.embeddings:
        results = list(report.embeddings.values())
        samples = sum(result["samples_in"] for result in results)
        found.append((count(samples), "samples", f"{results[0]['dim']} features each"))
    if report.clustering:
        result, measures = report.clustering.result, report.clustering.result["measures"]
        found.append((count(result["num_clusters"]), "clusters", f"{result['iterations']} iterations"))
        known = [key for key in ("acc", "nmi") if measures[key] is not None]
        found += [(measure(measures[key]), LABEL_MEASURES[key], _best_baseline(report, key)) for key in known]
        if not known:
            found.append((measure(measures["silhouette"]), "silhouette", "no labels"))
    if report.anomalies and (auroc := report.anomalies.result["measures"]["auroc"]) is not None:
        found.append((measure(auroc), "anomaly AUROC", "0.5 is chance"))
    if report.index:
        found.append((measure(report.index["recall_at_10"]), "recall@10", report.index["factory"]))
    if report.training and report.training.result:
        result = report.training.result
        rate = f"{count(round(result['samples_per_second']))} samples/s"
        found.append((duration(result["seconds"]), "training", rate))
    return found


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def _best_baseline(report: RunReport, name: str) -> str:
    values = {
        key: result["measures"][name]
        for key, result in report.baselines.items()
        if result["measures"][name] is not None
    }
    best = max(values, key=lambda key: values[key], default=None)
    return f"{best}: {measure(values[best])}" if best else ""


def _ordered(report: RunReport) -> list[Curve]:
    order = list(CURVES)
    place = {name: index for index, name in enumerate(order)}
    curves = report.training.curves if report.training else []
    return sorted(curves, key=lambda curve: place.get(curve.name, len(order)))


def _curve(curve: Curve) -> dict[str, Any]:
    title, hint = CURVES.get(curve.name, (curve.name.removeprefix("eval_").replace("_", " "), ""))
    show = percent if curve.name in SHARES else number
    first, last = curve.steps[0], curve.steps[-1]
    alt = f"{title}: {show(curve.values[0])} at step {count(first)}, {show(curve.values[-1])} at step {count(last)}"
    return {
        "title": title,
        "hint": hint,
        "last": show(curve.values[-1]),
        "low": show(min(curve.values)),
        "high": show(max(curve.values)),
        "first_step": first,
        "last_step": last,
        "chart": line_chart(curve.steps, curve.values, alt),
    }


def _measured(report: RunReport) -> list[tuple[str, Mapping[str, Any], bool]]:
    """The rows of the table of measures: (name, measures, is it this run's), baselines first."""
    if report.clustering is None:
        return []
    rows = [(name, result["measures"], False) for name, result in report.baselines.items()]
    return [*rows, ("this run", report.clustering.result["measures"], True)]


def _selection(report: RunReport) -> list[tuple[str, str, str]]:
    """(title, value, what to look for) of what chooses without labels, where the objective clusters."""
    trained = report.training.result.get("measures", {}) if report.training else {}
    if "held_out_loss" not in trained or report.clustering is None:
        return []
    known = {**trained, "silhouette": report.clustering.result["measures"]["silhouette"]}
    return [(title, measure(known[key]), hint) for key, (title, hint) in SELECTION.items() if key in known]


def _warnings(report: RunReport, settings: ReportConfig) -> list[str]:
    results = [report.training.result if report.training else {}, report.clustering.result if report.clustering else {}]
    warnings = [warning for result in results for warning in result.get("warnings", [])]
    if report.unread:
        what = f"{count(report.unread)} samples are not shown" if report.unread > 1 else "1 sample is not shown"
        limit = f"{settings.fetch_gb:g} GiB (report.fetch_gb)"
        warnings.append(f"{what}: of shards on a store a report reads at most {limit}")
    return warnings


def _size_chart(clustering: Clustering) -> Markup:
    sizes = sorted(clustering.sizes, reverse=True)
    mean = sum(sizes) / len(sizes)
    alt = f"Sizes of {len(sizes)} clusters, from {count(sizes[0])} to {count(sizes[-1])}, {number(mean)} on average"
    order = sorted(range(len(sizes)), key=lambda cluster: (-clustering.sizes[cluster], cluster))
    bars = means(sizes)
    titles = [f"cluster {cluster}: {count(clustering.sizes[cluster])}" for cluster in order]
    return bar_chart(bars, alt, titles if len(bars) == len(sizes) else (), mark=mean)


def _sweep(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A curve over the number of clusters for each of what the lines know."""
    curves = []
    for key, (title, hint) in SWEEP.items():
        known = [(line["num_clusters"], line[key]) for line in lines if line[key] is not None]
        if known:
            numbers, values = zip(*known, strict=True)
            pairs = ", ".join(f"{count(k)}: {number(value)}" for k, value in known)
            curves.append(
                {
                    "title": title,
                    "hint": hint,
                    "low": number(min(values)),
                    "high": number(max(values)),
                    "first": numbers[0],
                    "last": numbers[-1],
                    "chart": line_chart(numbers, values, f"{title} by number of clusters: {pairs}"),
                }
            )
    return curves


def _map_chart(reduction: Reduction) -> Markup | None:
    if reduction.points is None or reduction.clusters is None:
        return None
    method, clusters = reduction.result["map"]["method"].upper(), np.unique(reduction.clusters)
    alt = f"{method} of {count(len(reduction.points))} samples, coloured by {len(clusters)} clusters"
    return scatter_chart(reduction.points, reduction.clusters, alt)


def _score_chart(anomalies: Anomalies) -> Markup:
    edges = anomalies.edges
    titles = [
        f"{number(low)} to {number(high)}: {count(samples)}"
        for low, high, samples in zip(edges, edges[1:], anomalies.counts, strict=False)
    ]
    alt = f"Histogram of {count(sum(anomalies.counts))} anomaly scores, from {number(edges[0])} to {number(edges[-1])}"
    return bar_chart(anomalies.counts, alt, titles)
