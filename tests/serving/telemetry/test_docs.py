"""docs/metrics.md cannot go stale."""

from __future__ import annotations

import re
from pathlib import Path

from mergeroute.serving.telemetry.catalogue import PREFIX, table

_PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
_BLOCK = re.compile(r"<!-- metrics: begin -->\n(.*?)<!-- metrics: end -->", re.DOTALL)


def test_the_table_is_that_of_the_catalogue() -> None:
    [block] = _BLOCK.findall(_PAGE.read_text())
    command = "python -m mergeroute.serving.telemetry.catalogue docs/metrics.md"
    assert block == table(), f"renew it: {command}"


def test_every_metric_that_the_page_names_exists() -> None:
    known = set(re.findall(r"`(mergeroute_\w+)`", table()))
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "count", "sum")}
    named = set(re.findall(rf"{PREFIX}\w+", _PAGE.read_text()))
    assert named <= known | {"mergeroute_engine_"}
