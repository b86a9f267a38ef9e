"""Events of generations to OpenAI's response objects, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from ..routers.base import Decision
from ..runtime.types import TokenEvent, TokenLogprob
from .formats.tool_parsers import Piece, Reader
from .prompt_reports import ShownToken, echoed, echoed_text, generated, prompt_fields
from .schemas import CompletionRequest
from .service import Choice
from .token_text import TokenText, token_text


@dataclass
class Progress:
    """What a choice has produced so far.

    finish_reason: OpenAI's, once it ended. arrivals: of its tokens, by `time.perf_counter`.
    logprobs: events that have one.
    """

    choice: Choice
    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    arrivals: list[float] = field(default_factory=list)
    logprobs: list[TokenEvent] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        """Take one event in."""
        self.text += event.text
        if event.token_id is not None:
            self.arrivals.append(time.perf_counter())
            self.completion_tokens += 1
            self.token_ids.append(event.token_id)
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
            "cached_tokens": sum(c.generation.cached_tokens for c in prompts),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
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
    service_tier: Mapping[str, str] = {}

    def __init__(self, *, model: str, choices: Sequence[Choice], includes_usage: bool) -> None:
        self._hosted = choices[0].assignment.hosted
        self._includes_usage = includes_usage
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
        return token_text(self._hosted.tokenizer, token_id)

    def _name(self, token_id: int, choice: Choice) -> str:
        """How logprobs write a token."""
        if choice.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self._token(token_id).unique_text


class ChatShape(_Shape):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    service_tier: Mapping[str, str] = {"service_tier": "default"}

    def __init__(self, *, model: str, choices: Sequence[Choice], includes_usage: bool) -> None:
        super().__init__(model=model, choices=choices, includes_usage=includes_usage)
        self._readers = [choice.assignment.form.reader() for choice in choices]

    def body(self, progress: Sequence[Progress]) -> dict[str, Any]:
        """The whole response."""
        choices = [
            {
                "index": p.choice.index,
                **self._message(p),
                "logprobs": self._logprobs(p.logprobs, p.choice),
                **_token_ids(p),
            }
            for p in progress
        ]
        told = {"choices": choices, "usage": usage(progress), **prompt_fields(progress[0].choice)}
        return {**self._head(self.kind), **told}

    def opening(self, choice: Choice) -> dict[str, Any]:
        """The chunk that names the role."""
        content = None if choice.assignment.form.syntax else ""
        delta = {"role": "assistant", "content": content, "refusal": None}
        return self._chunk(_chat_choice(choice, delta, None, None))

    def chunk(self, choice: Choice, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk for an event."""
        events = [event] if event.logprob and not event.is_end else []
        reader = self._readers[choice.index]
        pieces = [reader.push(event.text)] + ([reader.flush()] if event.finish_reason else [])
        delta = _delta(pieces)
        if not (delta or event.finish_reason or events):
            return None
        if events and not delta:
            delta = {"content": ""}
        reason = _reason(event.finish_reason, reader) if event.finish_reason else None
        logprobs = self._logprobs(events, choice) if events else None
        return self._chunk(_chat_choice(choice, delta, logprobs, reason))

    def _message(self, progress: Progress) -> dict[str, Any]:
        reader = progress.choice.assignment.form.reader()
        said = _delta([reader.push(progress.text), reader.flush()])
        content = said.pop("content", None if said else "")
        for call in said.get("tool_calls", ()):
            del call["index"]
        return {
            "message": {"role": "assistant", "content": content, "refusal": None, **said},
            "finish_reason": _reason(progress.finish_reason, reader),
        }

    def _logprobs(self, events: Sequence[TokenEvent], choice: Choice) -> dict[str, Any] | None:
        if choice.top_logprobs is None:
            return None
        content = []
        for event in events:
            if event.logprob is None or event.is_end:
                continue
            tops = event.top_logprobs[: choice.top_logprobs]
            top = [self._entry(token, choice) for token in tops]
            content.append({**self._entry(event.logprob, choice), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: TokenLogprob, choice: Choice) -> dict[str, Any]:
        shown = self._token(token.token_id)
        spelled = None if shown.spelling is None else list(shown.spelling)
        by_id = choice.body.return_tokens_as_token_ids
        name = self._name(token.token_id, choice) if by_id else shown.text
        return {"token": name, "logprob": token.logprob, "bytes": spelled}


class CompletionShape(_Shape):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, *, model: str, choices: Sequence[Choice], includes_usage: bool) -> None:
        super().__init__(model=model, choices=choices, includes_usage=includes_usage)
        self._offsets = [0] * len(choices)
        self._echoing = {c.index for c in choices if _echoes(c)}

    def body(self, progress: Sequence[Progress]) -> dict[str, Any]:
        """The whole response."""
        choices = []
        for p in progress:
            text = self._echo(p.choice) + p.text
            logprobs = self._logprobs(p.logprobs, p.choice, echoes=_echoes(p.choice))
            choice = _text_choice(p.choice, text, logprobs, p.finish_reason)
            choices.append({**choice, **_token_ids(p), **prompt_fields(p.choice)})
        return {**self._head(self.kind), "choices": choices, "usage": usage(progress)}

    def chunk(self, choice: Choice, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk for an event."""
        events = [event] if event.logprob else []
        echoes = choice.index in self._echoing
        if not (event.text or event.finish_reason or events or echoes):
            return None
        reason = event.finish_reason.value if event.finish_reason else None
        logprobs = self._logprobs(events, choice, echoes=echoes) if events or echoes else None
        text = self._echo(choice) + event.text
        return self._chunk(_text_choice(choice, text, logprobs, reason))

    def _echo(self, choice: Choice) -> str:
        """The prompt, where it is asked for and was not given yet."""
        if choice.index not in self._echoing:
            return ""
        self._echoing.remove(choice.index)
        return echoed_text(choice)

    def _logprobs(
        self, events: Sequence[TokenEvent], choice: Choice, *, echoes: bool
    ) -> dict[str, Any] | None:
        count = choice.top_logprobs
        if count is None:
            return None
        tokens = [*(echoed(choice) if echoes else ()), *generated(events)]
        texts = [self._name(token.token_id, choice) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(self._token(token.token_id).text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token, choice, count) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: ShownToken, choice: Choice, count: int) -> dict[str, float] | None:
        """The best tokens and the token itself; of those that look alike, the best."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for each in (*token.top[:count], TokenLogprob(token.token_id, token.logprob)):
            top.setdefault(self._name(each.token_id, choice), each.logprob)
        return top


def _delta(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What pieces of an answer add to its message; each call once."""
    content = "".join(piece.content for piece in pieces)
    calls: dict[int, dict[str, Any]] = {}
    for part in (part for piece in pieces for part in piece.calls):
        opening = {"id": part.id, "type": "function"} if part.id else {}
        named = {"name": part.name} if part.name else {}
        call = calls.setdefault(part.index, {"index": part.index, **opening, "function": named})
        function = call["function"]
        function["arguments"] = function.get("arguments", "") + part.arguments
    told = {"tool_calls": list(calls.values())} if calls else {}
    return ({"content": content} if content else {}) | told


def _reason(reason: str | None, reader: Reader) -> str | None:
    """OpenAI's reason: an answer that ended in calls says so."""
    is_called = reader.calls_seen and reason == "stop"
    return "tool_calls" if is_called else reason


def _echoes(choice: Choice) -> bool:
    return isinstance(choice.body, CompletionRequest) and choice.body.echo


def _token_ids(progress: Progress) -> dict[str, Any]:
    """vLLM's, where asked for."""
    asked = progress.choice.body.return_token_ids
    return {"token_ids": progress.token_ids} if asked else {}


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
