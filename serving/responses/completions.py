"""The responses of /v1/completions: texts, after an echo of the prompt where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...runtime.types import TokenEvent, TokenLogprob
from ..choices import Choice
from ..prompt_reports import ShownToken, echoed, echoed_text, generated, prompt_fields
from ..schemas.completions import CompletionRequest
from .progress import Progress, usage
from .shape import BaseShape, token_ids_field


class CompletionShape(BaseShape):
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
            asked = token_ids_field(p) | prompt_fields(p.choice, self._texts)
            choices.append({**choice, **asked})
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


def _echoes(choice: Choice) -> bool:
    return isinstance(choice.body, CompletionRequest) and choice.body.echo


def _text_choice(
    choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
