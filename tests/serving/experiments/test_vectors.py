"""The committed vectors, against the code and against docs/assignment.md in three languages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mergeroute.serving.experiments.vectors import text

DOCS = Path(__file__).parents[3] / "docs"
VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (DOCS / "assignment_vectors.json").read_text("utf-8")
)
PAGE = (DOCS / "assignment.md").read_text("utf-8")
Bucket = Callable[[str, str], int]


def snippet(language: str) -> str:
    """The page's code in a language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def documented() -> Bucket:
    """The page's own function."""
    names: dict[str, Any] = {}
    exec(snippet("python"), names)  # our own page
    bucket: Bucket = names["bucket"]
    return bucket


def owner(runs: list[tuple[str, int, int]], position: int) -> str:
    """As the page says it."""
    (found,) = [name for name, start, end in runs if start <= position < end]
    return found


def as_the_page_says(runs: list[tuple[str, int, int]], weights: Mapping[str, float]) -> list[str]:
    """A ramp as the page says it, bucket by bucket."""
    owners = [owner(runs, n) for n in range(10_000)]
    names = [*weights, *sorted(set(owners) - set(weights))]
    gains = {n: round(weights.get(n, 0) * 10_000) - owners.count(n) for n in names}
    takers = [name for name in names for _ in range(gains[name])]
    result = list(owners)
    for loser in names:
        mine = [n for n in range(10_000) if owners[n] == loser]
        ours, takers = takers[: max(0, -gains[loser])], takers[max(0, -gains[loser]) :]
        before = [t for t in ours if names.index(t) < names.index(loser)]
        behind = ours[len(before) :]
        for n, taker in zip(mine, before, strict=False):
            result[n] = taker
        for n, taker in zip(mine[len(mine) - len(behind) :], behind, strict=True):
            result[n] = taker
    return result


def test_the_committed_vectors_are_those_of_the_code() -> None:
    assert (DOCS / "assignment_vectors.json").read_text("utf-8") == text(), (
        "run python -m mergeroute.serving.experiments.vectors > docs/assignment_vectors.json"
    )


def test_the_page_s_python() -> None:
    bucket = documented()
    assert all(bucket(row["salt"], row["key"]) == row["bucket"] for row in VECTORS["bucket"])
    for row in VECTORS["layer_bucket"]:
        assert bucket(f"layer:{row['layer']}", row["key"]) == row["bucket"]


def test_the_page_s_assignment() -> None:
    bucket = documented()
    for row in VECTORS["assignment"]:
        place = bucket(f"layer:{row['layer']}", row["key"])
        takes_part = any(start <= place < end for start, end in row["ranges"])
        drawn = owner(row["runs"], bucket(row["salt"], row["key"]))
        assert row["variant"] == (drawn if takes_part else None)
    assert len({row["variant"] for row in VECTORS["assignment"]}) == 4


def test_the_page_s_ramp() -> None:
    for ramp in VECTORS["ramp"]:
        for before, after in pairwise(ramp["steps"]):
            wanted = [owner(after["runs"], n) for n in range(10_000)]
            assert as_the_page_says(before["runs"], after["weights"]) == wanted


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs coreutils")
def test_the_page_s_shell() -> None:
    rows = VECTORS["bucket"]
    arguments = [part for row in rows for part in (row["salt"], row["key"])]
    loop = 'while [ $# -gt 0 ]; do bucket "$1" "$2"; shift 2; done'
    printed = output("bash", "-c", f"{snippet('bash')}\n{loop}", "bash", *arguments)
    assert [int(line) for line in printed.split()] == [row["bucket"] for row in rows]


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_page_s_javascript() -> None:
    rows = VECTORS["bucket"]
    ask = "console.log(JSON.stringify(JSON.parse(process.argv[1]).map(r => bucket(r.salt, r.key))))"
    printed = output("node", "-e", f"{snippet('javascript')}\n{ask}", json.dumps(rows))
    assert json.loads(printed) == [row["bucket"] for row in rows]
