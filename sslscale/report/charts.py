"""Charts as inline SVG. They hold shapes only and stretch to any width: what is read stands beside them as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 300, 100
MAX_POINTS = 240
GOLDEN_ANGLE = 137.508  # degrees: neighbouring numbers get hues far apart


def line_chart(steps: Sequence[float], values: Sequence[float], alt: str) -> Markup:
    """A curve over its own range; long ones as the means of MAX_POINTS runs of consecutive values."""
    xs, ys = means(steps), means(values)
    low, high = min(values), max(values)
    x = WIDTH * _unit(xs, min(steps), max(steps))
    y = HEIGHT * (1 - _unit(ys, low, high))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    if len(xs) == 1:
        points = f"0,{y[0]:.1f} {WIDTH},{y[0]:.1f}"
    return _svg(f'<polyline class="line" points="{points}"/>', alt)


def bar_chart(values: Sequence[float], alt: str, titles: Sequence[str] = (), mark: float | None = None) -> Markup:
    """Bars from zero, one a value; `mark` draws a level across them. `titles` are the bars' tooltips."""
    top = max(max(values), mark or 0) or 1
    slot = WIDTH / len(values)
    gap = slot * 0.18 if len(values) <= 120 else 0
    bars = []
    for index, value in enumerate(values):
        height = HEIGHT * value / top
        title = Markup("<title>{}</title>").format(titles[index]) if titles else ""
        bars.append(
            f'<rect class="bar" x="{index * slot + gap / 2:.2f}" y="{HEIGHT - height:.2f}" '
            f'width="{slot - gap:.2f}" height="{height:.2f}">{title}</rect>'
        )
    if mark is not None:
        y = HEIGHT * (1 - mark / top)
        bars.append(f'<line class="mark" x1="0" x2="{WIDTH}" y1="{y:.2f}" y2="{y:.2f}"/>')
    return _svg("".join(bars), alt)


def scatter_chart(points: np.ndarray, groups: np.ndarray, alt: str) -> Markup:
    """Points (m, 2) over their own range, each group (m,) of numbers from 0 in its own hue, negative ones in grey."""
    low, high = points.min(axis=0), points.max(axis=0)
    at = (points - low) / np.where(high > low, high - low, 1) * (WIDTH, HEIGHT)
    shapes = []
    for group in np.unique(groups).tolist():
        dots = "".join(f"M{x:.1f},{HEIGHT - y:.1f}h0" for x, y in at[groups == group].tolist())
        hue = "" if group < 0 else f' style="stroke:hsl({group * GOLDEN_ANGLE % 360:.0f} 60% 55%)"'
        title = Markup("<title>{}</title>").format("no cluster" if group < 0 else f"cluster {group}")
        shapes.append(f'<path class="dots"{hue} d="{dots}">{title}</path>')
    return _svg("".join(shapes), alt)


def means(values: Sequence[float], count: int = MAX_POINTS) -> list[float]:
    """At most `count` values: the means of consecutive runs of (almost) equal length."""
    runs = np.array_split(np.asarray(values, dtype=np.float64), min(count, len(values)))
    return [float(run.mean()) for run in runs]


def _unit(values: Sequence[float], low: float, high: float) -> np.ndarray:
    """Into 0 .. 1; a constant lies in the middle."""
    return (np.asarray(values) - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _svg(shapes: str, alt: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, alt
    )
    return head + Markup(shapes) + Markup("</svg>")
