"""What GET /v1/modules tells."""

from __future__ import annotations

import time

import httpx

from mergeroute.adapters.bank import Bank
from mergeroute.serving.modules.listing import module_entries
from mergeroute.serving.modules.state import State

from .test_changes import SAMPLES, SING, Hot, hot, text_of

__all__ = ["hot"]


def entries(hot: Hot) -> dict[str, dict[str, object]]:
    answer = httpx.get(hot.url + "/v1/modules").json()
    assert answer["object"] == "list"
    return {entry["id"]: entry for entry in answer["data"]}


def test_complaint_15_every_module_says_what_became_of_it(hot: Hot, bank: Bank) -> None:
    before = time.time()
    hot.load("sing", "sing", samples=SAMPLES, description="Songs", pinned=True)
    listed = entries(hot)
    assert list(listed) == ["upper", "digit", "sing"]
    sing = listed["sing"]
    digest = hot.service.hosted[0].digests["sing"]
    stated = {
        "name": "sing",
        "bank": "zoo",
        "object": "module",
        "state": "resident",
        "resident": True,
        "pinned": True,
        "generation": 1,
        "digest": digest,
        "hits": 0,
        "last_used": None,
        "cold_loads": 0,
        "description": "Songs",
        "samples": 10,
        "path": str(hot.root / "sing"),
        "error": None,
    }
    assert {key: sing[key] for key in stated} == stated
    assert int(str(sing["rank"])) >= 1
    assert int(str(sing["bytes"])) > 0
    assert listed["upper"]["description"] == "Prompts like upper"
    assert listed["upper"]["generation"] == 1

    text_of(hot.chat(SING, 1, model="sing"))
    after = httpx.get(hot.url + "/v1/modules/zoo:sing").json()
    assert after["hits"] == 1
    assert before <= after["last_used"] <= time.time()
    assert entries(hot)["sing"] == after


def test_a_module_that_goes_meanwhile_is_left_out(hot: Hot) -> None:
    hot.load("sing", "sing")
    seen = hot.service.targets
    hot.unload("sing")
    assert [entry["id"] for entry in module_entries(seen, State())] == ["upper", "digit"]


def test_a_module_that_is_not_there_is_404(hot: Hot) -> None:
    for name in ("nobody", "zoo", "zoo:nobody"):
        response = httpx.get(f"{hot.url}/v1/modules/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "lora_adapter_not_found"


def test_a_replaced_module_is_listed_as_what_it_is_now(hot: Hot) -> None:
    hot.load("sing", "sing", samples=SAMPLES)
    first = entries(hot)["sing"]
    hot.load("sing", "sing2", load_inplace=True)
    second = entries(hot)["sing"]
    assert second["digest"] != first["digest"]
    assert (first["generation"], second["generation"]) == (1, 2)
    assert (first["samples"], second["samples"]) == (10, 0)
    hot.unload("sing")
    assert "sing" not in entries(hot)
