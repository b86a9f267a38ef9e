"""The rows of benchmarks/smoe: what is compared, and how single rows are measured again."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.smoe import Result, known_results, summarise, together
from benchmarks.smoe_rows import rows
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.adapters.smoe.stored import Cost

NAMED = ("average of M-SMoE's groups", "average of random groups", "M-SMoE", "HC-SMoE", "REAP")


def test_every_method_stands_there_at_every_size_with_and_without_recovery() -> None:
    steps = {row.name: row.recovery for row in rows()}
    assert len(steps) == len(rows())
    labels = [f"{name}, {keep}" for name in NAMED for keep in (6, 4, 2)]
    residuals = ["M-SMoE, 6 + rank 8", "M-SMoE, 4 + rank 8", "M-SMoE, 2 + rank 16"]
    for group, own in (("merged", labels), ("grouped", residuals), ("shared", ["shared + rank 8"])):
        for label in own:
            assert steps[f"{group}: {label}"] == 0
            assert steps[f"recovered: {label}"] > 0


def test_every_row_can_be_built() -> None:
    for row in rows():
        if row.experts is not None:
            document = {"base": "moe", "experts": row.experts, "calibration": "prompts"}
            MoeRecipe.model_validate(document)


def test_rows_that_are_not_measured_again_stay_as_the_file_has_them(tmp_path: Path) -> None:
    cost = Cost(bytes=100, flops=10)
    old = [Result(row, {"a": 0.5}, cost) for row in rows()[:-1]]
    entries = summarise(old)
    entries[1]["experts"] = {"method": "random"}  # this one was built in another way
    file = tmp_path / "smoe.json"
    file.write_text(json.dumps({"rows": entries}))
    new = Result(rows()[-1], {"a": 0.25}, cost)
    found = together([new], known_results(file))
    assert [result.row for result in found] == [rows()[0], *rows()[2:]]
    assert summarise(found)[-1]["kept"] == 50
    assert summarise(found)[:-1] == [entries[0], *entries[2:]]
