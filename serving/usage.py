"""Usage: how much each module of a bank was used, from a file that was kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ..adapters.bank import Bank
from ..adapters.errors import DataError
from .telemetry.catalogue import PREFIX
from .telemetry.labels import OTHER

_METRIC = f"{PREFIX}module_weight_total"


def read_usage(path: Path, bank: Bank) -> dict[str, float]:
    """How much each module was used: a JSON object of numbers by module name, or what a server's
    /metrics gave, where it is the weight that blends gave to the modules of the bank of that name.

    Raises:
        DataError: the file is missing or damaged, or says nothing of this bank.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return _stated(path, text) if text.lstrip()[:1] == "{" else _counted(path, text, bank)


def _stated(path: Path, text: str) -> dict[str, float]:
    """Numbers by name."""
    try:
        document: Mapping[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    return {name: _number(path, name, value) for name, value in document.items()}


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{path}: {name!r} is {value!r}: give a number for every module")
    try:
        return float(value)
    except OverflowError as error:
        raise DataError(f"{path}: {name!r} is beyond every float: give smaller numbers") from error


def _counted(path: Path, text: str, bank: Bank) -> dict[str, float]:
    """The weights that a server counted."""
    try:
        families = list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"{path} is neither a JSON object of numbers by module nor what /metrics gives: {error}"
        ) from error
    samples = [s for family in families for s in family.samples if s.name == _METRIC]
    own = {s.labels["module"]: s.value for s in samples if s.labels["bank"] == bank.name}
    if not own:
        banks = ", ".join(sorted({sample.labels["bank"] for sample in samples}))
        raise DataError(
            f"{path} counts no use of modules of bank {bank.name!r} ({_METRIC}), of others: "
            f"{banks or 'none'}. Keep what /metrics gives, or JSON"
        )
    if OTHER in own and OTHER not in {module.name for module in bank.modules}:
        raise DataError(
            f"{path} counts modules together as {OTHER!r}: there were too many for series of their "
            "own; give JSON"
        )
    return own
