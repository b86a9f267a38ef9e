"""How small a fold makes a bank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import BankError
from .manifest import check_names
from .pool import FoldMethod


@dataclass(frozen=True)
class FoldSettings:
    """How small a bank becomes, by one of two measures or by both.

    to: how many modules are left; None: none is given up. nbytes: what all modules together take.
    usage: how much each module was used, in any unit; one that is not named was not. It decides
    which modules become one, and what each counts in it. method: how deltas are merged or
    shrunk, see `pool`; svd answers best on the zoo. name: of the new bank; None keeps it. force:
    replace the bank that stands at the new one's place.

    Raises:
        BankError: no measure is given, or usage is of no use.
    """

    to: int | None = None
    nbytes: int | None = None
    usage: Mapping[str, float] | None = None
    method: FoldMethod = "svd"
    name: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.to is None and self.nbytes is None:
            raise BankError("fold to a number of modules, into a number of bytes, or both")
        if self.usage is not None:
            _check_usage(self)
        if self.name is not None:
            check_names([self.name])


def _check_usage(settings: FoldSettings) -> None:
    assert settings.usage is not None
    if settings.to is None:
        raise BankError("usage says what is merged, and by bytes alone nothing is: give to, too")
    if settings.method == "lego":
        raise BankError("lego clusters units without weights: leave usage out, or use method svd")
    for name, use in settings.usage.items():
        if not _is_usable(use):
            raise BankError(f"the usage of {name!r} is {use!r:.20}: it is a number of at least 0")
    if not any(settings.usage.values()):
        raise BankError("no module was used: there is nothing to weigh by, leave usage out")


def _is_usable(use: float) -> bool:
    try:
        return math.isfinite(use) and use >= 0
    except OverflowError:  # an integer beyond every float
        return False
