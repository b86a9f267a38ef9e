"""The OpenAPI document against a running server: whatever it allows or forbids is answered as it
says, and never with a 5xx.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.experiments.live import LiveExperiments
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.state import StateFolder
from mergeroute.serving.openapi import CALLS
from mergeroute.serving.service import Service, ServiceOptions

from ..tiny import make_model, make_module
from .access.conftest import Guarded, guarded  # noqa: F401 - a fixture
from .conftest import running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
TARGETS = ["auto", "zoo", "upper", "zoo:digit", "tiny", "blend:upper=0.5", "nobody"]
GENERATES = ("/v1/chat/completions", "/v1/completions")
MOST_TOKENS = 8
BODIES = [key for key, call in CALLS.items() if call.body]
KEPT = 3
"""Fields beside the required ones; a body of all fields is wrong in one or another."""

Key = tuple[str, str]


@pytest.fixture(scope="module")
def api(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The document of a server that allows all there is."""
    root = tmp_path_factory.mktemp("roots")
    make_module(make_model(), "sql", seed=9).save(root / "sql")
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
    options = ServiceOptions(module_roots=(root,), uploads=True)
    state = StateFolder(tmp_path_factory.mktemp("state"))
    live = LiveExperiments(None, state.folder)
    with running(Service(host_banks([bank], placement), options, state, live)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=10)


@st.composite
def cases(draw: st.DrawFn, operation: Any, mode: GenerationMode) -> schemathesis.Case[Any]:
    """A request as the document allows or forbids it, of few fields where they are allowed, for
    few tokens, and often for a target that there is.
    """
    case: schemathesis.Case[Any] = draw(operation.as_strategy(generation_mode=mode))
    body = case.body
    if not isinstance(body, dict):
        return case
    if mode is GenerationMode.POSITIVE and draw(st.booleans()):
        required = {"messages", "prompt", "input", "tokens", "lora_name", "lora_path"}
        free = sorted(body.keys() - required)
        kept = draw(st.sets(st.sampled_from(free), max_size=KEPT)) if free else set()
        body = {key: value for key, value in body.items() if key in required | kept}
    if "model" in body and isinstance(body["model"], str):
        body["model"] = draw(st.sampled_from(TARGETS))
    if operation.path in GENERATES:
        _bound(body)
    case.body = body
    return case


def _bound(body: dict[str, Any]) -> None:
    """Few tokens, where nothing else was said of them."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for name in names or ["max_tokens"]:
        value = body.get(name, MOST_TOKENS)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        body[name] = MOST_TOKENS if is_number and value > MOST_TOKENS else value
    if isinstance(body.get("n"), int) and body["n"] > 2:
        body["n"] = 2


def check(api: Any, key: Key, mode: GenerationMode, examples: int) -> None:
    method, path = key
    operation = api[path][method.upper()]

    @given(case=cases(operation, mode))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def agrees(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    agrees()


def test_the_document_tells_of_every_route(api: Any) -> None:
    told = {(o.method, o.path) for found in api.get_all_operations() if (o := found.ok())}
    assert told == set(CALLS)


@pytest.mark.parametrize("key", CALLS, ids="-".join)
def test_what_is_allowed_is_answered_as_the_document_says(api: Any, key: Key) -> None:
    check(api, key, GenerationMode.POSITIVE, 15 if key in BODIES else 5)


@pytest.mark.parametrize("key", BODIES, ids="-".join)
def test_what_is_forbidden_is_answered_as_the_document_says(api: Any, key: Key) -> None:
    check(api, key, GenerationMode.NEGATIVE, 10)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("key", CALLS, ids="-".join)
def test_hundreds_of_requests(api: Any, key: Key, mode: GenerationMode) -> None:
    if mode is GenerationMode.NEGATIVE and key not in BODIES:
        pytest.skip("nothing can be wrong")
    check(api, key, mode, 200 if key in BODIES else 20)


def test_the_document_names_the_key_and_its_scope_where_keys_are_needed(guarded: Guarded) -> None:  # noqa: F811
    document = httpx.get(
        f"{guarded.url}/openapi.json", headers={"x-api-key": guarded.tokens["user"]}
    ).json()
    assert document["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"}
    }
    paths = document["paths"]
    assert "security" not in paths["/live"]["get"]
    assert paths["/metrics"]["get"]["security"] == [{"key": []}]
    assert paths["/v1/models/{name}"]["get"]["security"] == [{"key": ["inference"]}]
    assert paths["/v1/load_lora_adapter"]["post"]["security"] == [{"key": ["admin"]}]


def test_without_keys_the_document_asks_for_none(api: Any) -> None:
    assert "securitySchemes" not in api.raw_schema["components"]
