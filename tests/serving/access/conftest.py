"""A server that asks for keys, and keys of several kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.access.guard import Policy
from mergeroute.serving.access.key_file import KeyRing, add_key
from mergeroute.serving.access.keys import Key, new_token, token_hash
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service, ServiceOptions

from ...tiny import make_model, make_module
from ..conftest import running


@dataclass(frozen=True)
class Guarded:
    """A server with keys. tokens: by the key's name. file: of the keys. root: of modules."""

    url: str
    tokens: dict[str, str]
    file: Path
    root: Path
    service: Service

    def ask(self, path: str, key: str | None = None, **body: object) -> httpx.Response:
        """GET, or POST of a body, with a key of this name."""
        sent = {"Authorization": f"Bearer {self.tokens[key]}"} if key else {}
        method = "POST" if body else "GET"
        return httpx.request(
            method, self.url + path, headers=sent, json=body or None, timeout=60, trust_env=False
        )

    def chat(self, key: str | None = None, **body: object) -> httpx.Response:
        """Two tokens, of `auto` unless told otherwise."""
        messages = [{"role": "user", "content": "shout the word"}]
        body = {"messages": messages, "max_tokens": 2, "temperature": 0, **body}
        return self.ask("/v1/chat/completions", key, **body)


def make_key(file: Path, name: str, **values: object) -> str:
    token = new_token()
    add_key(file, Key.model_validate({"name": name, "hash": token_hash(token.encode()), **values}))
    return token


KEYS: dict[str, dict[str, object]] = {
    "all": {"scopes": ["inference", "admin"]},
    "user": {"scopes": ["inference"]},
    "admin": {"scopes": ["admin"]},
    "none": {"scopes": []},
    "old": {"expires": "2001-01-01T00:00:00Z"},
    "upper": {"targets": ["upper"]},
    "auto": {"targets": ["auto"]},
    "bank": {"targets": ["zoo"]},
    "full": {"targets": ["zoo:upper", "tiny"]},
    "later": {"targets": ["later"]},
    "slow": {"requests_per_minute": 2},
    "short": {"tokens_per_minute": 10},
    "embeds": {"tokens_per_minute": 5000},
}


@pytest.fixture(scope="module")
def guarded(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    file = folder / "keys.yaml"
    tokens = {name: make_key(file, name, **values) for name, values in KEYS.items()}
    make_module(make_model(), "sql", seed=9).save(folder / "sql")
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
    options = ServiceOptions(module_roots=(folder,))
    service = Service(host_banks([bank], placement), options)
    with running(service, Policy(KeyRing(file), is_exposed=True)) as url:
        yield Guarded(url, tokens, file, folder, service)
