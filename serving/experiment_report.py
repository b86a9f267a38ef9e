"""The report of an experiment as one page that needs nothing else: tables, plots, history."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .errors import SettingsError
from .experiment_client import not_understood
from .experiment_plots import Point, effect_plot
from .experiment_rows import metric_rows, ratio_line, shadow_rows, when
from .experiment_tables import read_list
from .experiments.answers import ExperimentResults

_TEMPLATE = Path(__file__).with_name("experiment_report.html")


def check_page(path: Path) -> None:
    """Refuse a page that could not be written, before a server is asked.

    Raises:
        SettingsError: there is no such folder, or a folder in its place.
    """
    if not path.parent.is_dir():
        raise SettingsError(f"{path} cannot be written: make the folder {path.parent} first")
    if path.is_dir():
        raise SettingsError(f"{path} is a folder: name a file in it")


def read_results(document: object) -> ExperimentResults:
    """What a server told.

    Raises:
        ServerError: the answer holds no results.
    """
    try:
        return ExperimentResults.model_validate(document)
    except ValidationError as error:
        raise not_understood(error) from error


def write_page(path: Path, results: ExperimentResults, versions: dict[str, Any]) -> None:
    """Write the page, in the place of one that is there.

    versions: of the experiment, as the server lists them.

    Raises:
        ServerError: what the server told holds something else.
        SettingsError: it cannot be written.
    """
    page = render_page(results, versions)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new.write_text(page, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from error


def render_page(results: ExperimentResults, versions: dict[str, Any]) -> str:
    """The page's HTML. Names, reasons and targets come from others: all is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["when"] = when
    history = read_list(versions)
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        results=results,
        newest=history[-1] if history else None,
        history=history[::-1],
        units=ratio_line(results.sample_ratio),
        sure=f"{100 * (1 - results.alpha):g} %",
        groups=[
            ("What decides", list(metric_rows(results, decides=True))),
            ("What is recorded beside", list(metric_rows(results, decides=False))),
        ],
        plots=_plots(results),
        shadows=list(shadow_rows(results)),
    )


def _plots(results: ExperimentResults) -> dict[str, Any]:
    """Pictures by metric, as markup: matplotlib has escaped what is in them."""
    from markupsafe import Markup

    try:
        points = TypeAdapter(list[Point]).validate_python(results.series or [])
    except ValidationError as error:
        raise not_understood(error) from error
    metrics = [metric.name for metric in results.metrics if metric.decides]
    drawn = {metric: effect_plot(points, metric) for metric in metrics}
    return {metric: Markup(svg) for metric, svg in drawn.items() if svg}
