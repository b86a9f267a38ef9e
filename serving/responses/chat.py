"""The responses of /v1/chat/completions: messages, and what a chunk adds to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.types import TokenEvent, TokenLogprob
from ..choices import Choice
from ..formats.tool_parsers import Piece, Reader
from ..prompt_reports import prompt_fields
from .progress import Progress, usage
from .shape import BaseShape, token_ids_field


class ChatShape(BaseShape):
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
                **token_ids_field(p),
            }
            for p in progress
        ]
        told = {"choices": choices, "usage": usage(progress)}
        return {**self._head(self.kind), **told, **prompt_fields(progress[0].choice, self._texts)}

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


def _chat_choice(
    choice: Choice,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: str | None,
) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
