"""Events of generations to OpenAI's response objects, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from ..routers.base import Decision
from ..runtime.types import TokenEvent, TokenLogprob
from .service import Choice
from .token_text import TokenText, token_text


@dataclass
class Progress:
    """What a choice has produced so far.

    finish_reason: OpenAI's, once it ended. first_token_at: by `time.perf_counter`.
    """

    choice: Choice
    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    first_token_at: float | None = None
    logprobs: list[TokenEvent] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        """Take one event in."""
        if self.first_token_at is None and event.token_id is not None:
            self.first_token_at = time.perf_counter()
        self.text += event.text
        self.completion_tokens += event.token_id is not None
        if event.logprob is not None:
            self.logprobs.append(event)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason.value


def blend_text(decision: Decision) -> str:
    """The blend as response headers show it."""
    return "per-token" if decision.token_routing else decision.blend.weights_text


def usage(progress: Sequence[Progress]) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, whatever n."""
    first_of_prompt = {id(p.choice.assignment): p.choice for p in reversed(progress)}
    prompts = list(first_of_prompt.values())
    prompt_tokens = sum(len(c.assignment.prompt.token_ids) for c in prompts)
    completion_tokens = sum(p.completion_tokens for p in progress)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(c.generation.cached_tokens for c in prompts)
        },
    }


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


class _Shape:
    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(self, *, model: str, choices: Sequence[Choice], includes_usage: bool) -> None:
        self._hosted = choices[0].assignment.hosted
        self._includes_usage = includes_usage
        self._common = {
            "id": f"{self.id_prefix}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self._hosted.fingerprint,
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
        return token_text(self._hosted.tokenizer, token_id)


class ChatShape(_Shape):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def body(self, progress: Sequence[Progress]) -> dict[str, Any]:
        """The whole response."""
        choices = [
            {
                "index": p.choice.index,
                "message": {"role": "assistant", "content": p.text, "refusal": None},
                "logprobs": self._logprobs(p.logprobs, p.choice),
                "finish_reason": p.finish_reason,
            }
            for p in progress
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage(progress)}

    def opening(self, choice: Choice) -> dict[str, Any]:
        """The chunk that names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(_chat_choice(choice, delta, None, None))

    def chunk(self, choice: Choice, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk for an event."""
        events = [event] if event.logprob else []
        if not (event.text or event.finish_reason or events):
            return None
        delta = {"content": event.text} if event.text or events else {}
        reason = event.finish_reason.value if event.finish_reason else None
        logprobs = self._logprobs(events, choice) if events else None
        return self._chunk(_chat_choice(choice, delta, logprobs, reason))

    def _logprobs(self, events: Sequence[TokenEvent], choice: Choice) -> dict[str, Any] | None:
        if choice.top_logprobs is None:
            return None
        content = []
        for event in events:
            assert event.logprob is not None
            top = [self._entry(token) for token in event.top_logprobs[: choice.top_logprobs]]
            content.append({**self._entry(event.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: TokenLogprob) -> dict[str, Any]:
        shown = self._token(token.token_id)
        spelled = None if shown.spelling is None else list(shown.spelling)
        return {"token": shown.text, "logprob": token.logprob, "bytes": spelled}


class CompletionShape(_Shape):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, *, model: str, choices: Sequence[Choice], includes_usage: bool) -> None:
        super().__init__(model=model, choices=choices, includes_usage=includes_usage)
        self._offsets = [0] * len(choices)

    def body(self, progress: Sequence[Progress]) -> dict[str, Any]:
        """The whole response."""
        choices = [
            _text_choice(p.choice, p.text, self._logprobs(p.logprobs, p.choice), p.finish_reason)
            for p in progress
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage(progress)}

    def chunk(self, choice: Choice, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk for an event."""
        events = [event] if event.logprob else []
        if not (event.text or event.finish_reason or events):
            return None
        reason = event.finish_reason.value if event.finish_reason else None
        logprobs = self._logprobs(events, choice) if events else None
        return self._chunk(_text_choice(choice, event.text, logprobs, reason))

    def _logprobs(self, events: Sequence[TokenEvent], choice: Choice) -> dict[str, Any] | None:
        count = choice.top_logprobs
        if count is None:
            return None
        tokens = [event.logprob for event in events if event.logprob is not None]
        texts = [self._token(token.token_id).unique_text for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(self._token(token.token_id).text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {
                    self._token(t.token_id).unique_text: t.logprob
                    for t in (
                        *event.top_logprobs[:count],
                        *([event.logprob] if event.logprob else []),
                    )
                }
                for event in events
            ],
            "text_offset": offsets,
        }


def _chat_choice(
    choice: Choice,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: str | None,
) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _text_choice(
    choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
