"""The table of quality_regimes.py: each row over its seeds, and its differences from others, paired by seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scipy.stats import t as student
from sittings import over_budget
from sklearn.metrics import adjusted_mutual_info_score

START, ALONE = "start", "alone"
BUDGETS = {"digits": 120.0, "fashion_mnist": 1200.0}  # seconds of training on two cores, a row's start among them
PRIMARY = {"recipe": "joint_scan", "difference": f"test_nmi_above_{ALONE}"}
AGAINST_LABELS = ("acc", "nmi", "ari", "test_acc", "test_nmi", "test_ari")
WITHOUT_LABELS = ("silhouette", "held_out_loss", "agreement", "clusters_used")
COMPARED = ("acc", "nmi", "test_acc", "test_nmi")

Line = Mapping[str, Any]


def interval(values: Sequence[float], comparisons: int = 1) -> dict[str, Any]:
    """The mean of n values, and half the width of its 95% interval by Student's t; `corrected_half` is of that which
    all of so many comparisons keep together (Bonferroni). Both are None for a single value.
    """
    found = {"mean": statistics.mean(values), "half": None, "corrected_half": None, "n": len(values)}
    if len(values) > 1:
        scale, freedom = statistics.stdev(values) / len(values) ** 0.5, len(values) - 1
        found["half"] = float(student.ppf(1 - 0.025, freedom)) * scale
        found["corrected_half"] = float(student.ppf(1 - 0.025 / comparisons, freedom)) * scale
    return found


def seed_agreement(lines: Sequence[Line]) -> float | None:
    """The mean AMI of the clusters of each two seeds, over the same test samples."""
    scores = [
        adjusted_mutual_info_score(list(one["clusters"]), list(other["clusters"]))
        for one, other in itertools.combinations(lines, 2)
    ]
    return statistics.mean(scores) if scores else None


def table(
    lines: Sequence[Line], dataset: str, followers: Collection[str], initial: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row a recipe. `followers` are those that go on from `start`; `initial` names a row's initialisation."""
    by_recipe: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line["dataset"] == dataset:
            by_recipe.setdefault(line["recipe"], {})[line["seed"]] = line
    starts = by_recipe.get(START, {})
    comparisons = len(set(followers) - set(initial.values()))
    rows = []
    for recipe, unordered in sorted(by_recipe.items()):
        own = dict(sorted(unordered.items()))
        row: dict[str, Any] = {"dataset": dataset, "recipe": recipe, "seeds": list(own)}
        for column in (*AGAINST_LABELS, *WITHOUT_LABELS):
            values = [line[column] for line in own.values() if line.get(column) is not None]
            row[column] = interval(values) if values else None
        row["seed_agreement"] = seed_agreement(list(own.values()))
        row |= _seconds(own, starts if recipe in followers else None, BUDGETS[dataset])
        row |= _experts(list(own.values()), begun=recipe not in initial.values())
        bases = {base: by_recipe.get(base, {}) for base in (ALONE, START) if base != recipe}
        if recipe in initial:
            bases["initial"] = by_recipe.get(initial[recipe], {})
        for base, theirs in bases.items():
            for column in COMPARED:
                paired = [
                    seed for seed in own if seed in theirs and (base != START or _begun_by(own[seed], theirs[seed]))
                ]
                pairs = [own[seed][column] - theirs[seed][column] for seed in paired]
                row[f"{column}_above_{base}"] = interval(pairs, comparisons) if pairs else None
        rows.append(row)
    return rows


def _begun_by(line: Line, start: Line) -> bool:
    """Whether a row's start is this one, and not one that was lost and trained again: no two take the same time."""
    return line.get("start_seconds", start["seconds"]) == start["seconds"]


def _seconds(own: Mapping[int, Line], starts: Mapping[int, Line] | None, budget: float) -> dict[str, Any]:
    """Means of a row's own seconds, of those with its start's (None where that is not known), and their share of the
    budget.
    """
    values = {seed: line["seconds"] for seed, line in own.items() if line.get("seconds") is not None}
    if starts is None:
        totals = list(values.values())
    else:
        begun = {seed: line["seconds"] for seed, line in starts.items()}  # of lines that do not say what theirs took
        begun |= {seed: line["start_seconds"] for seed, line in own.items() if "start_seconds" in line}
        totals = [value + begun[seed] for seed, value in values.items() if seed in begun]
    total = statistics.mean(totals) if totals else None
    return {
        "seconds": statistics.mean(values.values()) if values else None,
        "total_seconds": total,
        "budget_share": None if total is None else total / budget,
    }


def _experts(lines: Sequence[Line], begun: bool) -> dict[str, Any]:
    """Bits saved over a single expert, over the seeds, the lowest and the highest end of a seed's own interval over
    held-out samples, and in how many seeds the experts collapsed. No bits before training has `begun`: the single
    expert is then at random weights.
    """
    found = [line for line in lines if "bits_saved" in line]
    bits = (
        {
            "bits_saved": interval([line["bits_saved"] for line in found]),
            "bits_saved_low": min(line["bits_saved_low"] for line in found),
            "bits_saved_high": max(line["bits_saved_high"] for line in found),
        }
        if found and begun
        else dict.fromkeys(("bits_saved", "bits_saved_low", "bits_saved_high"))
    )
    return {**bits, "collapsed": sum(line["collapsed"] > 0 for line in found) if found else None}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Four tables: against labels, without labels, seconds, differences."""
    rows = sorted(rows, key=lambda row: (row["dataset"], -row["test_nmi"]["mean"] if row["test_nmi"] else 0.0))
    _show(rows, AGAINST_LABELS)
    _show(rows, (*WITHOUT_LABELS, "seed_agreement", "bits_saved", "bits_saved_low", "bits_saved_high", "collapsed"))
    _show(rows, ("seconds", "total_seconds", "budget_share"))
    for base in (ALONE, START, "initial"):
        names = [f"{column}_above_{base}" for column in COMPARED]
        own = [row for row in rows if any(row.get(name) for name in names)]
        _show(own, names)
        print("the same, corrected for the number of rows (Bonferroni)")
        _show(own, names, half="corrected_half")
    for row in rows:
        difference = row.get(PRIMARY["difference"])
        if row["recipe"] == PRIMARY["recipe"] and difference:
            print(f"primary: {row['dataset']} {PRIMARY['recipe']} {PRIMARY['difference']} {_cell(difference).strip()}")


def _show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], half: str = "half") -> None:
    print(f"\n{'dataset':<14}{'recipe':<14}{'seeds':>5}" + "".join(f"{column:>24}" for column in columns))
    for row in rows:
        cells = "".join(_cell(row.get(column), half) for column in columns)
        flag = over_budget(row["budget_share"]) if "budget_share" in columns else ""
        print(f"{row['dataset']:<14}{row['recipe']:<14}{len(row['seeds']):>5}{cells}{flag}")


def _cell(value: Mapping[str, Any] | float | None, half: str = "half") -> str:
    if value is None:
        return f"{'':>24}"
    if not isinstance(value, Mapping):
        return f"{format(value, '.3f') if isinstance(value, float) else value:>24}"
    text = f"{value['mean']:.3f}" if value[half] is None else f"{value['mean']:.3f} ±{value[half]:.3f}"
    return f"{text:>24}"
