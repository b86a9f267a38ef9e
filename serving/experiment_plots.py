"""Pictures of an experiment's effects over time."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from .experiment_rows import when
from .experiments.answers import Bounds

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any colour vision tell apart."""
_LINES = ("-", "--", "-.", ":")
_UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_EARLY = 0.2
"""Of the points, the first: their intervals are so wide that nothing else could be seen."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
}
_BARE: dict[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Effect(BaseModel):
    """Of a variant against the control, up to a moment."""

    absolute_change: float | None
    always_valid_interval: Bounds | None


class Point(BaseModel):
    """Effects by metric and variant, up to a moment."""

    at: float
    metrics: dict[str, dict[str, Effect]]


def effect_plot(points: Sequence[Point], metric: str) -> str | None:
    """The effect on a metric over time with its interval, as an SVG element without anything from
    elsewhere; None where nothing is known.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    told = [point for point in points if _is_known(point, metric)]
    if not told:
        return None
    with rc_context({**_SETTINGS, "svg.hashsalt": metric}):  # ids differ between pictures
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        _draw(figure.subplots(), told, metric)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=_BARE)
    svg = file.getvalue()
    return re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def _is_known(point: Point, metric: str) -> bool:
    return any(e.absolute_change is not None for e in point.metrics.get(metric, {}).values())


def _draw(axes: Any, points: Sequence[Point], metric: str) -> None:  # noqa: ANN401 - matplotlib's
    first = points[0].at
    unit, seconds = next((u for u in _UNITS if points[-1].at - first > 2 * u[1]), _UNITS[-1])
    times = [(point.at - first) / seconds for point in points]
    variants = sorted({variant for point in points for variant in point.metrics.get(metric, {})})
    axes.axhline(0, color="#555555", linewidth=0.8)
    for number, variant in enumerate(variants):
        effects = [point.metrics.get(metric, {}).get(variant) for point in points]
        colour = _COLOURS[number % len(_COLOURS)]
        line = _LINES[number % len(_LINES)]
        axes.plot(times, list(map(_change, effects)), line, color=colour, label=variant, marker=".")
        bounds = [e.always_valid_interval if e else None for e in effects]
        low = [each.lower if each else float("nan") for each in bounds]
        high = [each.upper if each else float("nan") for each in bounds]
        axes.fill_between(times, low, high, color=colour, alpha=0.18, linewidth=0)
    if limits := _limits(points, metric):
        axes.set_ylim(*limits)
    axes.set_xlabel(f"{unit} after {when(first)}")
    axes.set_ylabel("less the control's")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small", loc="best")


def _change(effect: Effect | None) -> float:
    found = effect.absolute_change if effect else None
    return float("nan") if found is None else found


def _limits(points: Sequence[Point], metric: str) -> tuple[float, float] | None:
    """What the later points take up, and 0."""
    later = points[int(_EARLY * len(points)) :]
    effects = [effect for point in later for effect in point.metrics.get(metric, {}).values()]
    bounds = [e.always_valid_interval for e in effects if e.always_valid_interval]
    values = [each for found in bounds for each in (found.lower, found.upper)]
    if not values:
        return None
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.08 * (high - low or 1.0)
    return low - room, high + room
