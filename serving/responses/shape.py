"""What the responses of all endpoints have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

from ...runtime.types import TokenEvent
from ..choices import Choice
from ..token_text import TokenText, TokenTexts
from .progress import Progress, usage


class Shape(Protocol):
    """How one endpoint writes its responses."""

    def body(self, progress: Sequence[Progress]) -> dict[str, Any]:
        """The whole response."""

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a choice, if it has one of its own."""

    def chunk(self, choice: Choice, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk for an event; None when there is nothing to say yet."""

    def closing(self, progress: Sequence[Progress]) -> dict[str, Any]:
        """The last chunk: usage, no choices."""


class BaseShape:
    """What the shapes of all endpoints share.

    kind: of the whole response, chunk_kind: of a chunk, as `object` states it.
    """

    kind = ""
    chunk_kind = ""
    id_prefix = ""
    service_tier: Mapping[str, str] = {}

    def __init__(self, *, model: str, choices: Sequence[Choice], includes_usage: bool) -> None:
        self._hosted = choices[0].assignment.hosted
        self._includes_usage = includes_usage
        self._texts = TokenTexts(self._hosted.tokenizer)
        self._common = {
            "id": f"{self.id_prefix}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self._hosted.fingerprint,
            **self.service_tier,
        }

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def closing(self, progress: Sequence[Progress]) -> dict[str, Any]:
        return {**self._head(self.chunk_kind), "choices": [], "usage": usage(progress)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {**self._common, "object": kind}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        return {**chunk, "usage": None} if self._includes_usage else chunk

    def _token(self, token_id: int) -> TokenText:
        return self._texts[token_id]

    def _name(self, token_id: int, choice: Choice) -> str:
        """How logprobs write a token."""
        if choice.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self._token(token_id).unique_text


def token_ids_field(progress: Progress) -> dict[str, Any]:
    """vLLM's, where asked for."""
    asked = progress.choice.body.return_token_ids
    return {"token_ids": progress.token_ids} if asked else {}
