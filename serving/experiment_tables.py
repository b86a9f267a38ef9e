"""Experiments and their results as tables of a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from .experiment_client import not_understood
from .experiment_rows import metric_rows, ratio_line, shadow_rows, when
from .experiments.answers import ExperimentResults

_ANY_TIME = "any time"
_METRIC_COLUMNS = (
    "metric",
    "variant",
    "units",
    "mean",
    "change",
    _ANY_TIME,
    "lift",
    "p",
    "best",
    "notes",
)
_SHADOW_COLUMNS = ("variant", "against", "pairs", "equal", "longer by", "ms slower", "score more")
_LEFT = ("metric", "variant", "notes", "against", "name", "state", "target", "control")

_Kind = TypeVar("_Kind", bound=BaseModel)


class ShownVariant(BaseModel):
    """What is shown of a variant."""

    name: str
    target: str
    weight: float
    control: bool


class Shown(BaseModel):
    """What is shown of an experiment at a version; a newer server may tell more."""

    name: str
    state: str
    version: int
    traffic: float
    attach_to: str | None
    variants: list[ShownVariant]
    promoted: str | None
    changed_at: float
    changed_by: str
    reason: str

    @property
    def weights(self) -> str:
        """Of all variants."""
        return ", ".join(f"{variant.name} {variant.weight:g}" for variant in self.variants)


class ShownList(BaseModel):
    """Experiments, or versions of one."""

    data: list[Shown]


def read_shown(document: object) -> Shown:
    """An experiment.

    Raises:
        ServerError: the answer is none.
    """
    return _read(Shown, document)


def read_list(document: object) -> list[Shown]:
    """Several; as `read_shown`."""
    return _read(ShownList, document).data


def list_table(document: dict[str, Any]) -> Table:
    """All experiments."""
    table = _table("name", "state", "version", "weights", "traffic", "promoted", "changed", "by")
    for one in read_list(document):
        cells = (one.name, one.state, str(one.version), one.weights, f"{one.traffic:g}")
        changed = (one.promoted or "", when(one.changed_at), one.changed_by)
        table.add_row(*map(escape, (*cells, *changed)))
    return table


def experiment_tables(document: dict[str, Any]) -> Iterator[RenderableType]:
    """One experiment."""
    one = read_shown(document)
    yield escape(f"{one.name}: {one.state}, version {one.version}")
    yield escape(f"{one.reason or 'created'} by {one.changed_by}, {when(one.changed_at)}")
    if one.promoted:
        yield escape(f"promoted: {one.promoted}")
    attached = f", and {one.attach_to}" if one.attach_to else ""
    if one.state != "concluded":
        yield escape(f"takes part: {100 * one.traffic:g} % of requests for {one.name}{attached}")
    table = _table("variant", "target", "weight", "control")
    for variant in one.variants:
        cells = (variant.name, variant.target, f"{variant.weight:g}")
        table.add_row(*map(escape, cells), "control" if variant.control else "")
    yield table


def result_tables(results: ExperimentResults) -> Iterator[RenderableType]:
    """What is known of one so far."""
    yield escape(f"{results.experiment}: {results.state}, version {results.version}")
    yield escape(f"winner: {results.verdict.winner or 'none yet'} ({results.verdict.reason})")
    yield escape(f"units: {ratio_line(results.sample_ratio)}")
    for warning in results.warnings:
        yield escape(f"warning: {warning}")
    for title, decides in (("what decides", True), ("what is recorded beside", False)):
        if rows := list(metric_rows(results, decides=decides)):
            table = _table(*_columns(results), title=title)
            for row in rows:
                table.add_row(*map(escape, astuple(row)))
            yield table
    if shadows := list(shadow_rows(results)):
        table = _table(*_SHADOW_COLUMNS, title="shadow answers, less those that users got")
        for shadow in shadows:
            table.add_row(*map(escape, astuple(shadow)))
        yield table


def _read(kind: type[_Kind], document: object) -> _Kind:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise not_understood(error) from error


def _columns(results: ExperimentResults) -> list[str]:
    sure = f"{_ANY_TIME}, {100 * (1 - results.alpha):g} %"
    return [sure if column == _ANY_TIME else column for column in _METRIC_COLUMNS]


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in _LEFT else "right")
    return table
