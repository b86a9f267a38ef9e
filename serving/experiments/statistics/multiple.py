"""Several p-values read at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from scipy.stats import false_discovery_control

Key = TypeVar("Key", bound=Hashable)


def adjusted(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """p-values to hold against alpha each: a share of alpha of what is then found is false.

    None stays None and counts for nothing.

    Source: Benjamini and Hochberg 1995, Controlling the False Discovery Rate, JRSS B 57(1).
    """
    known = {key: p for key, p in p_values.items() if p is not None}
    if not known:
        return dict(p_values)
    found = dict(zip(known, false_discovery_control(list(known.values())), strict=True))
    return {key: float(found[key]) if key in found else None for key in p_values}
