"""Finding: one thing that `mergeroute doctor` has looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..adapters.errors import MergerouteError

Level = Literal["ok", "note", "warning", "error"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Finding:
    """What was found.

    level: error: it will not work; warning: it will, and not as one would want; note: nothing is
    wrong, and something is good to know. subject: what was looked at. text: what is the case, and
    where something is wrong the rule and what to do.
    """

    level: Level
    subject: str
    text: str


class FaultError(Exception):
    """Something is at fault, so that what stands on it cannot be looked at."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def required(subject: str, made: Callable[[], _T]) -> _T:
    """What a function makes.

    Raises:
        FaultError: it cannot; the finding holds its reason.
    """
    try:
        return made()
    except MergerouteError as error:
        raise FaultError(Finding("error", subject, str(error))) from error
