"""Everything that a report shows of a run, gathered from its files in memory that does not grow with the run.

Arrays over rows are passed part by part; what stays are the few rows that are shown, and counts.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sslscale import storage
from sslscale.config import ReportConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features import FeatureSet, open_features
from sslscale.features.files import open_npy
from sslscale.index.record import IndexRecord
from sslscale.report.reduction import Reduction, collect_reduction
from sslscale.report.samples import SampleReader, Shown
from sslscale.rundir import RunDir, read_json, read_lines

HISTOGRAM_BINS = 60
MAX_REASONS = 1000  # kinds of failures told apart, at most
_COLUMNS = ("key", "shard", "offset", "label")
_NOT_CURVES = frozenset(("step", "total_steps"))


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged; values that were not finite are left out."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Training:
    """`result` is pretrain/result.json, empty while training is not finished."""

    result: dict[str, Any]
    curves: list[Curve]


@dataclass(frozen=True)
class ClusterView:
    """One cluster. `label` is its most frequent class and `label_share` that class's share, None without labels."""

    number: int
    size: int
    share: float
    exemplars: list[Shown]
    label: int | None = None
    label_share: float | None = None


@dataclass(frozen=True)
class Clustering:
    """`shown` are the largest clusters, largest first; `sizes` are all, by cluster number."""

    result: dict[str, Any]
    sizes: list[int]
    shown: list[ClusterView]


@dataclass(frozen=True)
class Scored:
    sample: Shown
    score: float
    neighbours: list[Shown] = field(default_factory=list)


@dataclass(frozen=True)
class Anomalies:
    """`most` is by falling score, `least` by rising score. `counts` (B,) are the scores between `edges` (B + 1,)."""

    result: dict[str, Any]
    most: list[Scored]
    least: list[Scored]
    counts: list[int]
    edges: list[float]


@dataclass(frozen=True)
class Failures:
    """What one stage lost: `reasons` are (reason, count, the key of one example), most frequent first."""

    stage: str
    count: int
    reasons: list[tuple[str, int, str]]


@dataclass(frozen=True)
class Count:
    """One line of the accounts: `taken` samples or rows went in, `given` came out, `failed` were lost."""

    stage: str
    taken: int
    given: int
    failed: int

    @property
    def adds_up(self) -> bool:
        return self.taken == self.given + self.failed


@dataclass(frozen=True)
class RunReport:
    """What is None or empty was not run.

    `run` is where the user knows it to be. `settings` are those that each stage on the page was made with, by its
    folder. `unread` samples are not shown, for what reading them would have taken.
    """

    run: str
    name: str
    manifest: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    embeddings: dict[str, dict[str, Any]]
    training: Training | None
    index: dict[str, Any] | None
    clustering: Clustering | None
    baselines: dict[str, dict[str, Any]]
    anomalies: Anomalies | None
    reduction: Reduction | None
    failures: list[Failures]
    counts: list[Count]
    unread: int


def collect(run: RunDir, config: RunConfig, name: str = "main") -> RunReport:
    """Gathers what the run has under `name`. Raises UserError where an answer was made from features since replaced."""
    settings = config.report or ReportConfig()
    reader = SampleReader(run, config)
    found = sorted(run.stage_path("embed").glob("*/result.json"))
    embeddings = {path.parent.name: read_json(path) for path in found}
    index = collect_index(run, name)
    clustering = collect_clusters(run, settings, reader, name)
    anomalies = collect_anomalies(run, settings, reader, name)
    answers = {
        "index": index,
        "cluster": clustering.result if clustering else None,
        "anomaly": anomalies.result if anomalies else None,
    }
    manifest = run.path / "manifest.json"
    return RunReport(
        run=storage.shown(run.path),
        name=name,
        manifest=read_json(manifest) if manifest.is_file() else {},
        settings=_settings(run, name, embeddings),
        embeddings=embeddings,
        training=collect_training(run),
        index=index,
        clustering=clustering,
        baselines={
            path.parents[2].name: read_json(path)
            for path in sorted(run.path.glob(f"baselines/*/cluster/{name}/result.json"))
        },
        anomalies=anomalies,
        reduction=_reduction(run, name),
        failures=list(collect_failures(run)),
        counts=_counts(run, name, embeddings, answers),
        unread=reader.unread,
    )


def _result(path: Path) -> dict[str, Any] | None:
    return read_json(path / "result.json") if (path / "result.json").is_file() else None


def _settings(run: RunDir, name: str, datasets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """stage.json's settings of the stages that the page is about: a later command may have had others."""
    answers = [run.stage_path(kind, name) for kind in ("index", "cluster", "anomaly", "reduce")]
    paths = [run.stage_path("pretrain"), *(run.stage_path("embed", dataset) for dataset in datasets), *answers]
    return {
        path.relative_to(run.path).as_posix(): read_json(path / "stage.json")["settings"]
        for path in paths
        if (path / "stage.json").is_file()
    }


def _datasets(path: Path, arrays: str) -> list[str]:
    """The datasets that a stage covered, in the order that its features were read in."""
    return read_json(path / "stage.json")["settings"]["datasets"] or storage.names(path / arrays)


def _features(run: RunDir, path: Path, parent: str, datasets: list[str] | None) -> FeatureSet:
    """The features that the stage at `path` was made from; UserError where they are others by now."""
    features = open_features(run, datasets)
    expected = read_json(path / "stage.json")["parents"][parent]
    if features.identity != expected:
        where = shlex.quote(storage.shown(run.path))
        raise UserError(
            f"{storage.shown(path)} was made from other features than the run has now",
            got=features.identity,
            allowed=expected,
            fix=f"sslscale {path.parent.name} --run {where} --name {path.name} --overwrite",
        )
    return features


# ------------------------------------------------------------------ training and index


def collect_index(run: RunDir, name: str) -> dict[str, Any] | None:
    """index/<name>/result.json."""
    path = run.stage_path("index", name)
    result = _result(path)
    if result is not None:
        IndexRecord.open(run, name).numbers(open_features(run, result["datasets"]))  # raises where they have changed
    return result


def collect_training(run: RunDir) -> Training | None:
    """The curves of pretrain/metrics.jsonl, in the order in which metrics first appear."""
    path = run.stage_path("pretrain")
    if not (path / "metrics.jsonl").is_file():
        return None
    curves: dict[str, Curve] = {}
    for line in read_lines(path / "metrics.jsonl"):
        for name, value in line.items():
            if name not in _NOT_CURVES and isinstance(value, int | float):
                curve = curves.setdefault(name, Curve(name, [], []))
                curve.steps.append(line["step"])
                curve.values.append(value)
    return Training(_result(path) or {}, list(curves.values()))


def _reduction(run: RunDir, name: str) -> Reduction | None:
    path = run.stage_path("reduce", name)
    result = _result(path)
    if result is None:
        return None
    datasets = read_json(path / "stage.json")["settings"]["datasets"]
    return collect_reduction(run, result, _features(run, path, "features", datasets), name)


# ------------------------------------------------------------------ the few rows that are shown


class Smallest:
    """The k smallest (value, row id) of all that were added, in order; equal values go by row id."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.items: list[tuple[float, int]] = []

    def add(self, values: np.ndarray, row_ids: np.ndarray) -> None:
        """`values` and `row_ids` are (n,), the row ids ascending."""
        first = np.argsort(values, kind="stable")[: self.k]
        added = zip(values[first].tolist(), row_ids[first].tolist(), strict=True)
        self.items = sorted([*self.items, *added])[: self.k]

    @property
    def row_ids(self) -> np.ndarray:
        return np.array([row for _, row in self.items], dtype=np.int64)


def _show(reader: SampleReader, features: FeatureSet, row_ids: np.ndarray) -> list[Shown]:
    return reader.show(features.records(row_ids, _COLUMNS))


def collect_clusters(run: RunDir, settings: ReportConfig, reader: SampleReader, name: str) -> Clustering | None:
    """The largest clusters, each with the rows nearest to its centroid."""
    path = run.stage_path("cluster", name)
    result = _result(path)
    if result is None:
        return None
    sizes = result["sizes"]
    largest = sorted((number for number, size in enumerate(sizes) if size), key=lambda number: (-sizes[number], number))
    nearest = {number: Smallest(settings.exemplars) for number in largest[: settings.max_clusters]}
    labels: dict[int, Counter[int]] | None = {number: Counter() for number in nearest}
    features = _features(run, path, "features", _datasets(path, "assignments"))
    for part in features.parts:
        assignments = open_npy(path / "assignments" / part.file)
        distances = open_npy(path / "distances" / part.file)
        own = features.stores[part.dataset].part_labels(part.part) if labels is not None else None
        labels = labels if own is not None else None
        order = np.argsort(assignments, kind="stable")
        starts = np.searchsorted(assignments[order], np.arange(len(sizes) + 1))
        for number, best in nearest.items():
            rows = order[starts[number] : starts[number + 1]]  # ascending
            best.add(distances[rows], part.number << 32 | rows)
            if labels is not None and own is not None:
                classes, counts = np.unique(own[rows], return_counts=True)
                labels[number].update(dict(zip(classes.tolist(), counts.tolist(), strict=True)))
    shown = _show(reader, features, np.concatenate([best.row_ids for best in nearest.values()]))
    views = []
    for number, best in nearest.items():
        exemplars, shown = shown[: len(best.items)], shown[len(best.items) :]
        label, count = labels[number].most_common(1)[0] if labels is not None else (None, 0)
        share = None if label is None else count / sizes[number]
        views.append(ClusterView(number, sizes[number], sizes[number] / sum(sizes), exemplars, label, share))
    return Clustering(result, sizes, views)


def collect_anomalies(run: RunDir, settings: ReportConfig, reader: SampleReader, name: str) -> Anomalies | None:
    """The rows of the highest scores with their nearest neighbours, those of the lowest, and a histogram of all."""
    path = run.stage_path("anomaly", name)
    result = _result(path)
    if result is None:
        return None
    features = _features(run, path, "features", _datasets(path, "scores"))
    files = [path / "scores" / part.file for part in features.parts]
    most, least = Smallest(settings.anomalies), Smallest(settings.anomalies)
    for part, file in zip(features.parts, files, strict=True):
        scores = open_npy(file)
        row_ids = part.number << 32 | np.arange(part.rows, dtype=np.int64)
        most.add(-scores, row_ids)
        least.add(scores, row_ids)
    span = (least.items[0][0], -most.items[0][0])
    counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for file in files:
        here, edges = np.histogram(open_npy(file), bins=HISTOGRAM_BINS, range=span)
        counts += here
    beside: list[Shown] = []
    k = min(settings.neighbours, result["k"] or 0)
    if result["reference"]:
        reference = _features(run, path, "reference", result["reference"])
        neighbours = [
            open_npy(path / "neighbours" / features.parts[row >> 32].file)[row & 0xFFFFFFFF]
            for row in most.row_ids.tolist()
        ]
        beside = _show(reader, reference, np.concatenate([ids[:k] for ids in neighbours]))
    return Anomalies(
        result,
        most=[
            Scored(sample, -value, beside[place * k : (place + 1) * k])
            for place, (sample, (value, _)) in enumerate(
                zip(_show(reader, features, most.row_ids), most.items, strict=True)
            )
        ],
        least=[
            Scored(sample, value)
            for sample, (value, _) in zip(_show(reader, features, least.row_ids), least.items, strict=True)
        ],
        counts=counts.tolist(),
        edges=edges.tolist(),
    )


# ------------------------------------------------------------------ what was lost, and whether the counts add up


def collect_failures(run: RunDir) -> Iterator[Failures]:
    """One record a stage that lost something. Reasons that differ only in their numbers count as one."""
    for folder in sorted([*run.path.glob("*/failed"), *run.path.glob("*/*/failed")]):
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for file in sorted(folder.glob("*.jsonl")):
            with file.open() as lines:
                for line in lines:
                    failure = json.loads(line)
                    reason = re.sub(r"\b\d+\b", "…", failure["reason"])
                    if reason not in reasons and len(reasons) >= MAX_REASONS:
                        reason = "other reasons"
                    reasons[reason] += 1
                    examples.setdefault(reason, failure["key"])
        if reasons:
            listed = [(reason, count, examples[reason]) for reason, count in reasons.most_common()]
            yield Failures(folder.parent.relative_to(run.path).as_posix(), reasons.total(), listed)


def _counts(
    run: RunDir, name: str, embeddings: dict[str, dict[str, Any]], answers: dict[str, dict[str, Any] | None]
) -> list[Count]:
    counts = [
        Count(f"embed/{dataset}", result["samples_in"], result["features_out"], result["failed"])
        for dataset, result in embeddings.items()
    ]
    arrays = {"cluster": "assignments", "anomaly": "scores"}
    for kind, result in answers.items():
        if result is not None:
            covered = result["datasets"] if kind == "index" else _datasets(run.stage_path(kind, name), arrays[kind])
            taken = sum(embeddings[dataset]["features_out"] for dataset in covered)
            given = result["num_vectors" if kind == "index" else "num_samples"]
            counts.append(Count(f"{kind}/{name}", taken, given, result.get("num_deleted", 0)))
    return counts
