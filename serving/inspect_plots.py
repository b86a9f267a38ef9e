"""The pictures of `mergeroute inspect`: energy by rank, and how alike experts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.energy import Spectrum
from ..adapters.survey import Survey
from .inspect_entries import block_of
from .inspection import InspectError, Inspection

ENERGY_FILE = "energy.png"
SIMILARITY_FILE = "similarity.png"

_DEPTH_COLOURS = "viridis"
_COSINE_COLOURS = "RdBu_r"
"""Both are told apart with any colour vision."""
_OUTSIDE = "#D55E00"
_MOST_NUMBERS = 16
"""Up to so many experts every cosine is written into its cell."""


def check_folder(folder: Path) -> None:
    """Make the folder of the pictures, before anything is read for them.

    Raises:
        InspectError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InspectError(f"{folder} cannot be made: {error.strerror}") from error


def plot(inspection: Inspection, folder: Path) -> list[Path]:
    """Draw what was found; the pictures written. One expert alone has no similarity.

    Raises:
        InspectError: there are no deltas of linear layers to draw, or a picture cannot be written.
    """
    survey = inspection.survey
    if survey is None or not survey.linear:
        raise InspectError(
            f"--plot draws changes of linear layers, this {inspection.document['kind']} has none: "
            "name a recipe, a bank or a LoRA folder that has"
        )
    figures = {ENERGY_FILE: draw_energy(survey)}
    if len(survey.names) > 1:
        word = "expert" if inspection.document["kind"] == "recipe" else "module"
        figures[SIMILARITY_FILE] = draw_similarity(survey, word=word)
    try:
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=150)
    except OSError as error:
        raise InspectError(f"{folder} cannot be written: {error.strerror}") from error
    return [folder / name for name in figures]


def draw_energy(survey: Survey) -> Any:  # noqa: ANN401 - matplotlib's Figure
    """A panel per expert: cumulative energy against rank, a line per layer, coloured by block."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    rows, columns = _grid(len(survey.names))
    side = 5.0 if len(survey.names) == 1 else 2.6 if rows < 4 else 2.1
    figure = Figure(figsize=(columns * side + 1.5, rows * side * 0.85 + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    colours = _depth_colours(survey)
    for axes, name in zip(panels, survey.names, strict=False):
        _draw_curves(axes, survey, name, colours)
    for axes in panels[len(survey.names) :]:
        axes.set_visible(False)
    for k in range(len(survey.names) - columns, len(survey.names)):
        panels[k].tick_params(labelbottom=True)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
    panels[0].set_ylim(0, 1.02)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle("Energy of each linear layer's change in its first components", fontsize=11)
    figure.supxlabel("rank (components kept)", fontsize=10)
    figure.supylabel("energy kept", fontsize=10)
    if colours is not None:
        bar = figure.colorbar(colours, ax=list(panels), shrink=0.8, aspect=30)
        bar.set_label("block of layers (0 is nearest to the input)")
        bar.locator = _whole_numbers()
        bar.update_ticks()
    return figure


def draw_similarity(survey: Survey, *, word: str = "expert") -> Any:  # noqa: ANN401
    """A heat map of the cosines between the experts' deltas. The diagonal, which is 1, is grey;
    the colours span the others, symmetric about zero.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    cosine, count = survey.cosine().clone(), len(survey.names)
    cosine.fill_diagonal_(math.nan)
    known = cosine[cosine.isfinite()].abs()
    limit = max(float(known.max()) if len(known) else 0.0, 0.05)
    side = max(4.0, (0.6 if count <= _MOST_NUMBERS else 0.28) * count + 1.5)
    figure = Figure(figsize=(side + 1.3, side), layout="constrained")
    axes = figure.subplots()
    colours = colormaps[_COSINE_COLOURS].with_extremes(bad="#BBBBBB")
    image = axes.imshow(cosine.numpy(), cmap=colours, vmin=-limit, vmax=limit)
    small = 9 if count <= _MOST_NUMBERS else 8
    axes.set_xticks(range(count), survey.names, rotation=90, fontsize=small)
    axes.set_yticks(range(count), survey.names, fontsize=small)
    axes.set_xlabel(word)
    axes.set_ylabel(word)
    axes.set_title("Cosine between deltas, all linear layers (grey: itself)", fontsize=11)
    if count <= _MOST_NUMBERS:
        _write_numbers(axes, cosine.tolist(), limit)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine")
    return figure


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns, wider than high, with few places left empty."""
    about = math.ceil(math.sqrt(1.5 * count))
    columns = min(range(max(1, about - 1), about + 2), key=lambda c: (-count % c, abs(c - about)))
    columns = min(columns, count)
    return math.ceil(count / columns), columns


def _draw_curves(axes: Any, survey: Survey, name: str, colours: Any) -> None:  # noqa: ANN401
    for parameter in survey.linear:
        if name in parameter.spectra:
            ranks, energy = _curve(parameter.spectra[name])
            block = block_of(parameter.name)
            colour = _OUTSIDE if block is None or colours is None else colours.to_rgba(block)
            axes.plot(ranks, energy, color=colour, linewidth=0.8, alpha=0.8)
    for share in (0.9, 0.99):
        axes.axhline(share, color="grey", linewidth=0.6, linestyle=":")
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, alpha=0.25)


def _curve(spectrum: Spectrum) -> tuple[list[int], list[float]]:
    curve = spectrum.curve()
    return list(curve), list(curve.values())


def _depth_colours(survey: Survey) -> Any:  # noqa: ANN401 - matplotlib's ScalarMappable
    """Colours by block; None where no layer's name tells its block."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    blocks = [b for p in survey.linear if (b := block_of(p.name)) is not None]
    if not blocks:
        return None
    return ScalarMappable(Normalize(min(blocks), max(*blocks, min(blocks) + 1)), _DEPTH_COLOURS)


def _whole_numbers() -> Any:  # noqa: ANN401
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _write_numbers(axes: Any, cosine: Sequence[Sequence[float]], limit: float) -> None:  # noqa: ANN401
    for i, row in enumerate(cosine):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            text = "" if math.isnan(value) else f"{value:z.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
