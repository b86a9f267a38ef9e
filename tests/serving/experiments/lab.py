"""A server with experiments on three targets of two banks, and a client's view of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.access.guard import EVERYBODY, Policy
from mergeroute.serving.experiments.live import LiveExperiments
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.state import StateFolder
from mergeroute.serving.service import Service, ServiceOptions

from ..conftest import running

PLACEMENT = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
UNIT = "x-mergeroute-assignment-key"
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Lab:
    """A running server. live: its experiments. folder: of its state."""

    url: str
    service: Service
    live: LiveExperiments
    folder: Path
    http: httpx.Client
    openai: openai.OpenAI

    def call(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return self.http.request(method, path, json=body, headers=headers)

    def change(self, name: str, verb: str, **body: object) -> dict[str, Any]:
        """POST a change, which succeeds."""
        response = self.call("POST", f"/v1/experiments/{name}/{verb}", body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def begin(self, **values: object) -> dict[str, Any]:
        """Create an experiment and start it."""
        response = self.call("POST", "/v1/experiments", experiment(**values))
        assert response.status_code == 201, response.text
        return self.change(response.json()["name"], "start")

    def clear(self) -> None:
        """Undo promotions, and delete all experiments: records of theirs count no more."""
        store = self.live.store
        while default := store.default_target():
            self.change(default.experiment, "rollback")
        for stored in store.list():
            if stored.state in ("running", "paused"):
                self.change(stored.name, "conclude")
            assert self.call("DELETE", f"/v1/experiments/{stored.name}").status_code == 204

    def chat(self, model: str, user: str | None = None, **more: Any) -> httpx.Response:
        """Two tokens for a user."""
        headers = {**({UNIT: user} if user else {}), **more.pop("headers", {})}
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "shout the word"}],
            "max_tokens": 2,
            "temperature": 0,
            **more,
        }
        return self.call("POST", "/v1/chat/completions", body, headers)

    def feedback(
        self, response: httpx.Response | str, value: object, metric: str = "score", **headers: str
    ) -> httpx.Response:
        """Of an answer."""
        given = response if isinstance(response, str) else response.headers["x-request-id"]
        body = {"request_id": given, "metric": metric, "value": value}
        return self.call("POST", "/v1/feedback", body, headers)


def experiment(**values: object) -> dict[str, Any]:
    """A bank against another one."""
    variants = [
        {"name": "old", "target": "zoo", "weight": 0.5, "control": True},
        {"name": "new", "target": "farm", "weight": 0.5},
    ]
    metrics = [
        {"name": "score", "kind": "binary", "direction": "up"},
        {"name": "clicks", "kind": "count", "direction": "up"},
        {"name": "joy", "kind": "continuous", "direction": "up"},
    ]
    return {"name": "trial", "salt": "pepper", "variants": variants, "metrics": metrics, **values}


@contextmanager
def lab(
    banks: list[Bank],
    folder: Path,
    *,
    policy: Policy = EVERYBODY,
    options: ServiceOptions | None = None,
    database: str | None = None,
) -> Iterator[Lab]:
    """Serve banks with experiments kept in a folder."""
    state = StateFolder(folder)
    live = LiveExperiments(database, folder)
    service = Service(host_banks(banks, PLACEMENT), options or ServiceOptions(), state, live)
    with (
        running(service, policy) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Lab(url, service, live, folder, http, client)


def eventually(look: Callable[[], _Found], seconds: float = 10) -> _Found:
    """What comes a moment later."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.02)
    return look()
