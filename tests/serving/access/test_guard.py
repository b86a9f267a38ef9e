"""Who is let in: every route with every kind of key, over HTTP."""

from __future__ import annotations

import re
import time

import httpx
import openai
import pytest
from starlette.routing import Route

from mergeroute.serving.access.guard import EVERYBODY, Policy, is_loopback
from mergeroute.serving.access.key_file import revoke_key
from mergeroute.serving.access.scopes import ROUTES, access_to
from mergeroute.serving.app import create_app

from ..conftest import Served, running
from .conftest import Guarded, make_key

LETS_IN: dict[str, set[str | None]] = {
    "open": {None, "wrong", "user", "admin", "none", "all"},
    "any": {"user", "admin", "none", "all"},
    "inference": {"user", "all"},
    "admin": {"admin", "all"},
}
REFUSED = ("invalid_api_key", "insufficient_scope", "api_keys_required")
"""A route may refuse by itself what is switched off."""


def test_every_route_says_what_it_takes(served: Served) -> None:
    app = create_app(served.service)
    assert all(isinstance(route, Route) for route in app.routes), "a mount hides its routes"
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    assert paths - ROUTES.keys() == set(), "put the new route into serving/access/scopes.py"


def test_a_route_that_says_nothing_takes_the_most() -> None:
    assert access_to("/v1/new") == "admin"


def error_code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"]) if answer.content else ""


def test_each_route_lets_in_who_may_and_nobody_else(guarded: Guarded) -> None:
    app = create_app(guarded.service)
    routes = [route for route in app.routes if isinstance(route, Route)]
    with httpx.Client(base_url=guarded.url, timeout=60, trust_env=False) as client:
        for route in routes:
            path = re.sub(r"\{.*?\}", "zoo", route.path)
            for method in (route.methods or set()) & {"GET", "POST", "DELETE", "PATCH"}:
                for key in (None, "wrong", "old", "user", "admin", "none", "all"):
                    token = guarded.tokens.get(key or "", "mr-wrong")
                    sent = {"Authorization": f"Bearer {token}"} if key else {}
                    answer = client.request(method, path, headers=sent)
                    status = answer.status_code
                    access: str = access_to(route.path)
                    where = (method, path, key)
                    if key in LETS_IN[access]:
                        assert status < 400 or error_code(answer) not in REFUSED, where
                    elif key in (None, "wrong", "old"):
                        assert status == (401 if access != "open" else 200), where
                    else:
                        assert status == 403, where


def test_no_key_a_wrong_one_and_an_expired_one_are_told_alike(guarded: Guarded) -> None:
    wrong = {"Authorization": "Bearer mr-" + "A" * 43}
    old = {"Authorization": f"Bearer {guarded.tokens['old']}"}
    basic = {"Authorization": "Basic " + guarded.tokens["all"]}
    url = f"{guarded.url}/v1/models"
    answers = [httpx.get(url, headers=h, trust_env=False) for h in ({}, wrong, old, basic)]
    assert len({answer.text for answer in answers}) == 1
    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["x-request-id"]
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_the_openai_client_and_the_other_headers_work(guarded: Guarded) -> None:
    token = guarded.tokens["user"]
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=token, max_retries=0) as client:
        assert client.models.list().data
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="mr-no", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    for name in ("x-api-key", "api-key"):
        sent = {name: token}
        found = httpx.get(f"{guarded.url}/v1/models", headers=sent, trust_env=False)
        assert found.status_code == 200


def test_unknown_paths_tell_nothing_without_a_key(guarded: Guarded) -> None:
    assert guarded.ask("/v1/nothing").status_code == 401
    assert guarded.ask("/v1/nothing", "user").status_code == 404


def test_complaint_17_load_endpoints_take_an_admin_key(guarded: Guarded) -> None:
    body = {"lora_name": "later", "lora_path": "sql"}
    for key, status in ((None, 401), ("user", 403), ("upper", 403)):
        assert guarded.ask("/v1/load_lora_adapter", key, **body).status_code == status
    assert "later" not in guarded.service.targets.resolve("zoo").hosted.digests
    assert guarded.chat("later", model="later").status_code == 404
    assert guarded.ask("/v1/load_lora_adapter", "admin", **body).status_code == 200
    assert guarded.chat("later", model="later").status_code == 200
    assert guarded.ask("/v1/unload_lora_adapter", "admin", lora_name="later").status_code == 200


def test_complaint_17_load_endpoints_without_keys_are_for_this_machine_alone(
    served: Served,
) -> None:
    def asked(policy: Policy, **headers: str) -> httpx.Response:
        with running(_Unstopped(served.service), policy) as url:  # type: ignore[arg-type]
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            target = f"{url}/v1/unload_lora_adapter"
            body = {"lora_name": "nothing"}
            return httpx.post(target, json=body, headers=sent, trust_env=False)

    assert asked(EVERYBODY).status_code == 404  # let in
    assert asked(EVERYBODY, host="localhost:8000").status_code == 404
    for refused in (
        asked(Policy(is_exposed=True)),
        asked(EVERYBODY, host="rebound.example"),
        asked(EVERYBODY, host="[::1"),
        asked(EVERYBODY, origin="https://evil.example"),
        asked(EVERYBODY, x_forwarded_for="203.0.113.5"),
    ):
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "api_keys_required"
        assert "mergeroute key create" in refused.json()["error"]["message"]


class _Unstopped:
    """A service that goes on when one of its servers ends."""

    def __init__(self, service: object) -> None:
        self._service = service

    def __getattr__(self, name: str) -> object:
        return getattr(self._service, name)

    def close(self) -> None:
        """Leave it running."""


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("", False),
    ],
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_a_key_made_and_revoked_while_the_server_runs(guarded: Guarded) -> None:
    guarded.tokens["new"] = make_key(guarded.file, "new")
    assert _status_within(guarded, "new", 200)
    revoke_key(guarded.file, "new")
    assert _status_within(guarded, "new", 401)


def _status_within(guarded: Guarded, key: str, status: int) -> bool:
    for _ in range(30):
        if guarded.ask("/v1/models", key).status_code == status:
            return True
        time.sleep(0.1)
    return False


def test_requests_over_the_rate_are_told_when_to_come_again(guarded: Guarded) -> None:
    first, second, third = (guarded.ask("/v1/models", "slow") for _ in range(3))
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert 1 <= int(third.headers["retry-after"]) <= 61
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert guarded.ask("/v1/models", "user").status_code == 200  # each key has its own


def test_tokens_are_charged_when_they_are_known_streamed_or_not(guarded: Guarded) -> None:
    first = guarded.chat("short", stream=True)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-tokens"] == "10"
    second = guarded.chat("short")
    assert second.status_code == 429
    assert "tokens a minute" in second.json()["error"]["message"]


def test_embeddings_are_charged_for_all_their_groups(guarded: Guarded) -> None:
    texts = ["x" * 240] * 20
    answer = guarded.ask("/v1/embeddings", "embeds", input=texts)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-tokens"] == "200"


def test_pages_may_call_only_where_they_are_let(served: Served) -> None:
    def preflight(policy: Policy) -> httpx.Response:
        asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        with running(_Unstopped(served.service), policy) as url:  # type: ignore[arg-type]
            return httpx.options(f"{url}/v1/completions", headers=asked, trust_env=False)

    assert "access-control-allow-origin" not in preflight(EVERYBODY).headers
    allowed = preflight(Policy(cors_origins=("https://app.example",)))
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    other = preflight(Policy(cors_origins=("https://other.example",)))
    assert "access-control-allow-origin" not in other.headers
