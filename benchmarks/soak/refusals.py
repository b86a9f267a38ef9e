"""Requests that must be refused, each by its own status and code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from .ledger import Ledger

_CHAT = "/v1/chat/completions"
_LOAD = "/v1/load_lora_adapter"


@dataclass(frozen=True)
class Refusal:
    """What is sent, and how it must be refused. body: sent as it is where it is bytes."""

    status: int
    code: str | None
    path: str
    body: object
    key: str | None = "one"
    method: str = "POST"


def _chat(**more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Write 14."}], "max_tokens": 2, **more}


REFUSALS: tuple[Refusal, ...] = (
    Refusal(400, None, _CHAT, b"{not json"),
    Refusal(400, None, _CHAT, {"model": "auto"}),
    Refusal(400, None, _CHAT, _chat(messages=[])),
    Refusal(400, None, _CHAT, _chat(temperature=3)),
    Refusal(400, None, _CHAT, _chat(n=0)),
    Refusal(400, None, _CHAT, _chat(top_logprobs=3)),
    Refusal(400, "unsupported_parameter", _CHAT, _chat(nonsense=1)),
    Refusal(400, "context_length_exceeded", _CHAT, _chat(max_tokens=5000)),
    Refusal(400, None, _CHAT, _chat(model="blend:roman=9")),
    Refusal(404, "model_not_found", _CHAT, _chat(model="nobody")),
    Refusal(404, "model_not_found", _CHAT, _chat(model="blend:roman=1,nobody=1")),
    Refusal(413, None, _CHAT, b" " * 70_000),
    Refusal(401, None, _CHAT, _chat(), key=None),
    Refusal(404, "model_not_found", _CHAT, _chat(model="german"), key="roman"),
    Refusal(403, "insufficient_scope", _CHAT, _chat(), key="admin"),
    Refusal(403, "insufficient_scope", _LOAD, {"lora_name": "x", "lora_path": "x"}),
    Refusal(400, None, _LOAD, {"lora_name": "x"}, key="admin"),
    Refusal(404, None, "/v1/unload_lora_adapter", {"lora_name": "x"}, key="admin"),
    Refusal(404, None, "/v1/nothing", {}),
    Refusal(405, None, _CHAT, None, method="GET"),
)


async def check_refusal(
    refusal: Refusal, client: httpx.AsyncClient, keys: Mapping[str, str], ledger: Ledger
) -> None:
    """Ask for it, and look at how it is refused."""
    headers = {"Authorization": f"Bearer {keys[refusal.key]}"} if refusal.key else {}
    content = refusal.body if isinstance(refusal.body, bytes) else None
    json = refusal.body if content is None else None
    response = await client.request(
        refusal.method, refusal.path, content=content, json=json, headers=headers
    )
    ledger.statuses[response.status_code] += 1
    code = response.json()["error"]["code"]
    is_right = response.status_code == refusal.status and refusal.code in (None, code)
    told = f"{response.status_code} {response.text[:300]}"
    ledger.check(is_right, f"{refusal.path} {refusal.body!r:.200}: {told}, not {refusal.status}")
