"""The field `routing`: every token's own modules, for this request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.errors import BankError
from mergeroute.routers.settings import TokenSettings
from mergeroute.routers.store import save_router
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service, ServiceOptions

from ..tiny import make_model, make_module
from .conftest import Served, running

MESSAGES = [{"role": "user", "content": "shout the word 7"}]


def post(url: str, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 6, **body}
    return httpx.post(url + path, json=asked, timeout=60)


@pytest.mark.parametrize(
    "routing",
    ["arrow", "spectr", {"method": "arrow", "top_k": 1}, {"method": "spectr", "smoothing": 0.5}],
)
@pytest.mark.parametrize("model", ["auto", "zoo"])
def test_every_token_is_routed_and_the_headers_say_so(
    served: Served, routing: object, model: str
) -> None:
    response = post(served.url, routing=routing, model=model)
    assert response.status_code == 200, response.text
    method = routing["method"] if isinstance(routing, dict) else routing
    headers = response.headers
    assert headers["x-mergeroute-blend"] == "per-token"
    assert headers["x-mergeroute-router"] == method
    assert headers["x-mergeroute-abstained"] == "0"
    assert float(headers["x-mergeroute-confidence"]) == 1
    preview = post(served.url, "/v1/route", routing=routing, model=model).json()
    stated = routing if isinstance(routing, dict) else {"method": routing}
    assert (preview["routing"], preview["blend"], preview["router"]) == (stated, {}, method)
    assert (preview["abstained"], preview["confidence"]) == (0.0, 1.0)


def test_it_streams_and_differs_from_the_backbone(served: Served) -> None:
    plain = post(served.url, model="tiny", max_tokens=20).json()
    routed = post(served.url, routing="arrow", max_tokens=20).json()
    assert plain["choices"][0]["message"] != routed["choices"][0]["message"]
    streamed = post(served.url, routing="arrow", max_tokens=20, stream=True)
    assert streamed.headers["x-mergeroute-blend"] == "per-token"
    assert streamed.text.rstrip().endswith("[DONE]")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"routing": "nothing"}, "nothing"),
        ({"routing": 3}, "arrow"),
        ({"routing": ["arrow"]}, "arrow"),
        ({"routing": {"top_k": 1}}, "method"),
        ({"routing": {"method": "arrow", "x": 1}}, "'x'"),
        ({"routing": {"method": "arrow", "top_k": -1}}, "top_k"),
        ({"routing": {"method": "arrow", "temperature": 0}}, "temperature"),
        ({"routing": {"method": ["arrow"]}}, "method"),
        ({"routing": "phatgoose"}, "phatgoose"),
        ({"routing": "arrow", "model": "upper"}, "model 'upper'"),
        ({"routing": "arrow", "model": "tiny"}, "model 'tiny'"),
        ({"routing": "arrow", "model": "blend:upper=1"}, "model 'blend:upper=1'"),
        ({"routing": "arrow", "blend": {"upper": 1}}, "blend"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route"])
def test_what_cannot_be_routed_is_refused_by_name(
    served: Served, body: dict[str, Any], words: str, path: str
) -> None:
    response = post(served.url, path, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "routing"
    assert words in response.json()["error"]["message"]


def test_a_bank_without_modules_has_nothing_to_weigh(bank: Bank) -> None:
    service = Service(host_banks([Bank.adhoc("bare", bank.backbone, [])], Placement()))
    with running(service) as url:
        for path in ("/v1/chat/completions", "/v1/route"):
            response = post(url, path, routing="arrow")
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "routing"


def token_bank(folder: Path, bank: Bank, method: str) -> Bank:
    """The modules of a bank, one of them twice, and a router that leaves the choice to layers."""
    (first, *_) = bank.modules
    settings = TokenSettings.model_validate({"scorer": method})
    return write_bank(
        folder,
        name="byt",
        backbone=bank.backbone,
        modules=[*bank.modules, BankModule("again", first.path)],
        write_router=lambda path: save_router(path, settings),
    )


def test_a_banks_own_router_may_leave_the_choice_to_the_layers(bank: Bank, tmp_path: Path) -> None:
    make_module(make_model(), "new", seed=70).save(tmp_path / "new")
    hosted = host_banks([token_bank(tmp_path / "byt", bank, "arrow")], Placement(dtype="float32"))
    service = Service(hosted, ServiceOptions(module_roots=(tmp_path,)))
    with running(service) as url:
        for more in ({}, {"conversation": "c"}, {"conversation": "c"}):
            answer = post(url, max_tokens=20, **more)
            assert answer.headers["x-mergeroute-blend"] == "per-token"
            assert answer.headers["x-mergeroute-router"] == "arrow"
        assert post(url, "/v1/route").json()["routing"] == {"method": "arrow"}
        assert post(url, model="again").headers["x-mergeroute-blend"] == "again=1"

        new = {"lora_name": "new", "lora_path": "new"}
        loaded = httpx.post(url + "/v1/load_lora_adapter", json=new)
        assert "token by token" in loaded.text
        weighed = post(url, max_tokens=20).json()["choices"][0]["message"]
        assert weighed != answer.json()["choices"][0]["message"]
        for name in ("new", "upper", "again"):
            gone = httpx.post(url + "/v1/unload_lora_adapter", json={"lora_name": name})
            assert gone.status_code == 200, gone.text
        last = httpx.post(url + "/v1/unload_lora_adapter", json={"lora_name": "digit"})
        assert (last.status_code, last.json()["error"]["code"]) == (409, "conflict")
        assert post(url).status_code == 200


def test_a_router_that_the_modules_cannot_follow_is_refused_at_start(
    bank: Bank, tmp_path: Path
) -> None:
    with pytest.raises(BankError, match="gates"):
        host_banks([token_bank(tmp_path / "byt", bank, "phatgoose")], Placement(dtype="float32"))
