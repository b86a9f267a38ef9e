"""Which targets a key may ask for: in serving, preview and listing alike."""

from __future__ import annotations

import pytest

from .conftest import Guarded

BLEND = {"upper": 0.5, "digit": 0.5}


@pytest.mark.parametrize(
    ("key", "body", "allowed"),
    [
        ("user", {"model": "auto"}, True),
        ("user", {"model": "digit"}, True),
        ("upper", {"model": "upper"}, True),
        ("upper", {"model": "zoo:upper"}, True),
        ("upper", {"model": "blend:upper=0.5"}, True),
        ("upper", {"blend": {"upper": 0.5}}, True),
        ("upper", {"adapter_id": "upper"}, True),
        ("upper", {"model": "auto"}, False),
        ("upper", {}, False),
        ("upper", {"model": "zoo"}, False),
        ("upper", {"model": "digit"}, False),
        ("upper", {"model": "zoo:digit"}, False),
        ("upper", {"model": "tiny"}, False),
        ("upper", {"model": "tiny:digit"}, False),
        ("upper", {"model": "blend:upper=0.5,digit=0.5"}, False),
        ("upper", {"blend": BLEND}, False),
        ("upper", {"blend": {}}, False),
        ("upper", {"adapter_id": "digit"}, False),
        ("upper", {"merged_adapters": {"ids": ["upper", "digit"]}}, False),
        ("upper", {"lora": [{"id": 1, "scale": 1.0}]}, False),
        ("upper", {"lora": [{"id": 99, "scale": 1.0}]}, False),
        ("upper", {"model": "nothing"}, False),
        ("upper", {"model": "digit", "blend": {"upper": 1.0}}, False),
        ("upper", {"model": "upper", "blend": {"upper": 1.0}}, False),
        ("auto", {"model": "auto"}, True),
        ("auto", {"model": "zoo"}, False),
        ("auto", {"model": "upper"}, False),
        ("auto", {"model": "auto", "blend": {"upper": 1.0}}, False),
        ("bank", {"model": "zoo"}, True),
        ("bank", {"model": "auto"}, True),
        ("bank", {"model": "digit"}, True),
        ("bank", {"blend": BLEND}, True),
        ("full", {"model": "upper"}, True),
        ("full", {"model": "tiny"}, True),
        ("full", {"model": "digit"}, False),
        ("later", {"model": "later"}, False),
    ],
)
def test_a_key_gets_its_targets_and_no_others(
    guarded: Guarded, key: str, body: dict[str, object], allowed: bool
) -> None:
    served = guarded.chat(key, **body)
    messages = [{"role": "user", "content": "shout the word"}]
    preview = guarded.ask("/v1/route", key, messages=messages, **body)
    assert served.status_code == preview.status_code == (200 if allowed else 404), served.text
    if not allowed:
        assert served.json() == preview.json()
        error = served.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_name_that_is_not_allowed_is_told_like_one_that_is_not_there(guarded: Guarded) -> None:
    there = guarded.chat("upper", model="digit").json()["error"]["message"]
    gone = guarded.chat("upper", model="gones").json()["error"]["message"]
    assert there.replace("digit", "") == gone.replace("gones", "")
    assert "zoo" not in there


def test_models_lists_what_the_key_may_ask_for(guarded: Guarded) -> None:
    def listed(key: str) -> set[str]:
        return {entry["id"] for entry in guarded.ask("/v1/models", key).json()["data"]}

    assert listed("user") == {"auto", "zoo", "tiny", "upper", "digit"}
    assert listed("upper") == {"upper"}
    assert listed("auto") == {"auto"}
    assert listed("bank") == {"auto", "zoo", "tiny", "upper", "digit"}
    assert listed("full") == {"upper", "tiny"}
    assert listed("later") == set()
    assert guarded.ask("/v1/models/upper", "upper").status_code == 200
    assert guarded.ask("/v1/models/digit", "upper").status_code == 404


def test_complaint_19_one_keys_conversation_is_not_anothers(guarded: Guarded) -> None:
    said = {"conversation": "shared", "model": "zoo"}
    first = guarded.chat("user", **said)
    assert first.status_code == 200
    digits = [{"role": "user", "content": "0 1 2 3 4 9"}]
    fresh = guarded.chat("bank", model="zoo", messages=digits)
    joined = guarded.chat("bank", messages=digits, **said)
    shown = "x-mergeroute-blend"
    assert joined.headers[shown] == fresh.headers[shown]
