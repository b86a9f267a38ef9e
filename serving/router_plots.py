"""Pictures of a router's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..routers.curve import CurvePoint
from ..routers.report import Case, RouterReport
from .eval_plot import PlotError

RELIABILITY_FILE = "reliability.png"
CONFUSION_FILE = "confusion.png"
DISTANCES_FILE = "distances.png"
SAMPLES_FILE = "samples.png"

_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#555555"
"""Of Okabe and Ito's, which people with any colour vision tell apart."""
_MOST_NUMBERS = 24
"""Up to so many labels every count is written into its cell."""


def check_folder(folder: Path) -> None:
    """Make the folder of the pictures, before anything is measured for them.

    Raises:
        PlotError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlotError(f"{folder} cannot be made: {error.strerror}") from error


def plot_router(
    report: RouterReport, cases: Sequence[Case], folder: Path, *, curve: Sequence[CurvePoint] = ()
) -> list[Path]:
    """Draw what there is to draw; the pictures written.

    Raises:
        PlotError: one cannot be written.
    """
    from matplotlib.figure import Figure

    pictures: dict[str, Callable[[Any], None]] = {}
    if report.bins:
        pictures[RELIABILITY_FILE] = lambda figure: _draw_reliability(figure, report)
    if report.own or report.none:
        pictures[CONFUSION_FILE] = lambda figure: _draw_confusion(figure, report)
    if any(case.decision.distance is not None for case in cases):
        pictures[DISTANCES_FILE] = lambda figure: _draw_distances(figure, cases)
    if curve:
        pictures[SAMPLES_FILE] = lambda figure: _draw_curve(figure, curve)
    for name, draw in pictures.items():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        draw(figure)
        try:
            figure.savefig(folder / name, dpi=150)
        except OSError as error:
            raise PlotError(f"{folder / name} cannot be written: {error.strerror}") from error
    return [folder / name for name in pictures]


def _draw_reliability(figure: Any, report: RouterReport) -> None:  # noqa: ANN401 - matplotlib's
    """Above, accuracy by confidence; below, how many prompts there are."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidences = [each.confidence for each in report.bins]
    upper.plot([0, 1], [0, 1], "--", color=_GREY, label="as sure as right")
    upper.plot(confidences, [each.accuracy for each in report.bins], "o-", color=_BLUE)
    upper.set_ylim(0, 1.03)
    upper.set_ylabel("share that is right")
    upper.set_title(
        f"Confidence before abstention, expected calibration error {report.calibration_error:.4f}",
        fontsize=11,
    )
    upper.legend(loc="lower right")
    lower.bar(confidences, [each.count for each in report.bins], 1 / 20, color=_BLUE)
    lower.set_yscale("log")
    lower.set_ylabel("prompts")
    lower.set_xlim(0, 1.03)
    lower.set_xlabel("confidence")


def _draw_confusion(figure: Any, report: RouterReport) -> None:  # noqa: ANN401
    """Counts, coloured by their share of the row."""
    count = len(report.labels)
    side = max(4.8, 0.45 * count + 2)
    figure.set_size_inches(side + 1, side)
    axes = figure.subplots()
    shares = [[cell / (sum(row) or 1) for cell in row] for row in report.confusion]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(count)
    axes.set_xticks(places, report.labels, rotation=45, ha="right")
    axes.set_yticks(places, report.labels)
    axes.set_xlabel("the router chose")
    axes.set_ylabel("right is")
    axes.set_title("Prompts by what is right and what was chosen", fontsize=11)
    if count <= _MOST_NUMBERS:
        for i, row in enumerate(report.confusion):
            for j, cell in enumerate(row):
                if cell:
                    ink = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(cell), ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the row")


def _draw_distances(figure: Any, cases: Sequence[Case]) -> None:  # noqa: ANN401
    """Cumulative: how many prompts are nearer than a distance, own ones and those of none."""
    axes = figure.subplots()
    groups = (
        ("of modules", True, _BLUE, "-"),
        ("that no module serves", False, _ORANGE, "--"),
    )
    for label, is_own, colour, style in groups:
        found = sorted(
            case.decision.distance
            for case in cases
            if case.decision.distance is not None and (case.module is not None) is is_own
        )
        if found:
            shares = [(k + 1) / len(found) for k in range(len(found))]
            axes.step(found, shares, style, where="post", color=colour, label=f"prompts {label}")
    thresholds = {c.decision.threshold for c in cases if c.decision.threshold is not None}
    for threshold in thresholds:
        axes.axvline(threshold, color=_GREY, label="threshold of abstention")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("distance: how unlike the modules' own prompts")
    axes.set_ylabel("share of prompts that are nearer")
    axes.set_title("Prompts right of the threshold are left to the backbone", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2)


def _draw_curve(figure: Any, curve: Sequence[CurvePoint]) -> None:  # noqa: ANN401
    """Mean over draws, and their range."""
    axes = figure.subplots()
    samples = [point.samples for point in curve]
    for key, label, colour, style in (
        ("before", "before abstention", _ORANGE, "s--"),
        ("accuracy", "after: an abstention is wrong", _BLUE, "o-"),
    ):
        draws = [getattr(point, key) for point in curve]
        axes.plot(samples, [100 * sum(d) / len(d) for d in draws], style, color=colour, label=label)
        lowest, highest = ([100 * pick(d) for d in draws] for pick in (min, max))
        axes.fill_between(samples, lowest, highest, color=colour, alpha=0.2)
    axes.set_xscale("log")
    axes.set_xticks(samples, [str(count) for count in samples])
    axes.minorticks_off()
    axes.set_xlabel("samples of each module")
    axes.set_ylabel("accuracy on held-out prompts, %")
    axes.set_title(f"Accuracy by number of samples; {len(curve[0].accuracy)} draws", fontsize=11)
    axes.legend(loc="lower right")
    axes.grid(visible=True, alpha=0.3)
