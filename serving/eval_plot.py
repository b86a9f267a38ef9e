"""The picture of an evaluation: scores per task, and scores against bytes per task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.errors import MergerouteError
from .figures import AUTO, BACKBONE, EXPERTS, ORACLE, Figures, Report

SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's, which people with any colour vision tell apart."""
_HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")
_MARKERS = "os^Dv*PX"


class PlotError(MergerouteError):
    """A plot that cannot be drawn or written."""


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before anything is measured for it.

    Raises:
        PlotError: another suffix than png, svg or pdf, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"{path} ends with none of {', '.join(SUFFIXES)}: name the plot so")
    if not path.parent.is_dir():
        raise PlotError(f"{path} cannot be written: make the folder {path.parent} first")


def plot_report(report: Report, path: Path) -> None:
    """Draw a report.

    Left, bars of every system's score per task, and means; right, mean score against the mean bytes
    of a task's own weights: its module's or its expert's, none with backbone or static merge.

    Raises:
        PlotError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [*(report.tasks or report.generic), *filter(None, (report.mean, report.generic_mean))]
    width = max(6.0, 0.22 * len(rows) * (len(report.systems) + 1))
    figure = Figure(figsize=(width + 4.5, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(width, 4.0))
    metric = f"score in % ({report.about['metric']})"
    _draw_bars(left, report, rows, metric)
    _draw_bytes(right, report, metric)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    try:
        with rc_context({"svg.hashsalt": "mergeroute"}):  # equal figures make equal files
            figure.savefig(path, dpi=150, metadata=_without_date(path))
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}") from error


def _draw_bars(axes: Any, report: Report, rows: list[Figures], metric: str) -> None:  # noqa: ANN401
    bar = 0.8 / len(report.systems)
    for k, (system, style) in enumerate(_styles(report).items()):
        known = [(i, row.scores[system]) for i, row in enumerate(rows) if system in row.scores]
        places = [i + (k - (len(report.systems) - 1) / 2) * bar for i, _ in known]
        axes.bar(
            places,
            [score for _, score in known],
            bar,
            label=system,
            color=style["color"],
            hatch=style["hatch"],
            edgecolor="white",
            linewidth=0.5,
        )
    axes.set_xticks(range(len(rows)), [row.task for row in rows], rotation=45, ha="right")
    axes.axvline(len(report.tasks or report.generic) - 0.5, color="grey", linewidth=0.8)
    axes.set_ylim(0, 105)
    axes.set_xlabel("task (right of the line: means over tasks)")
    axes.set_ylabel(metric)


def _draw_bytes(axes: Any, report: Report, metric: str) -> None:  # noqa: ANN401 - matplotlib's Axes
    mean = report.mean or report.generic_mean
    assert mean is not None
    for system, style in _styles(report).items():
        if system in mean.scores:
            megabytes = _bytes_per_task(system, mean) / 1e6
            axes.plot(
                megabytes,
                mean.scores[system],
                style["marker"],
                color=style["color"],
                fillstyle="none",
                markeredgewidth=2,
                markersize=9,
                label=system,
            )
    axes.legend(fontsize="small")
    axes.margins(x=0.1)
    axes.set_xlabel("a task's own weights, MB")
    axes.set_ylabel(f"mean {metric}")
    axes.set_ylim(0, 105)
    axes.grid(visible=True, alpha=0.3)


def _bytes_per_task(system: str, mean: Figures) -> int:
    if system in (AUTO, ORACLE):
        return mean.module_bytes or 0
    return mean.expert_bytes or 0 if system == EXPERTS else 0


def _styles(report: Report) -> dict[str, dict[str, str]]:
    """Colour, hatch and marker by system; the backbone and the bank's own always have the same."""
    order = [s for s in (BACKBONE, AUTO, ORACLE, EXPERTS) if s in report.systems]
    order += [system for system in report.systems if system not in order]
    return {
        system: {
            "color": _COLOURS[k % len(_COLOURS)],
            "hatch": _HATCHES[(k + k // len(_COLOURS)) % len(_HATCHES)],
            "marker": _MARKERS[k % len(_MARKERS)],
        }
        for k, system in enumerate(order)
    }


def _without_date(path: Path) -> Mapping[str, None]:
    """What keeps the time of drawing out of the file."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
