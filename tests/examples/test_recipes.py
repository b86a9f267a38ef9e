"""The example recipes build, and what they build answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rich.console import Console

from mergeroute.adapters.recipe_file import read_recipe
from mergeroute.serving.building import build_bank
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.schemas.completions import ChatRequest
from mergeroute.serving.service import Service

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.parametrize("name", ["twin.yaml", "mergekit.yaml"])
def test_an_example_recipe_builds_a_bank_that_routes(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / name)
    bank = build_bank(recipe, tmp_path / "bank", device="cpu", console=Console(quiet=True))
    service = Service(host_banks([bank], Placement(device="cpu", dtype="float32")))
    try:
        asked = [{"role": "user", "content": "What is 14 in Roman numerals?"}]
        body = ChatRequest.model_validate({"messages": asked})
        decision = asyncio.run(service.preview(body))
    finally:
        service.stop()
    assert decision["blend"] == ({"roman": 1.0} if name == "twin.yaml" else {})
