"""What running choices have produced so far, and what it counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.types import TokenEvent
from ..choices import Choice


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
    told_prompt_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Of its prompt, as the engine that was passed the body told, else as it was rendered."""
        if self.told_prompt_tokens is not None:
            return self.told_prompt_tokens
        return len(self.choice.assignment.prompt.token_ids)

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


def usage(progress: Sequence[Progress]) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, whatever n."""
    first_of_prompt = {id(p.choice.assignment): p for p in reversed(progress)}
    prompts = list(first_of_prompt.values())
    prompt_tokens = sum(p.prompt_tokens for p in prompts)
    completion_tokens = sum(p.completion_tokens for p in progress)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(p.choice.generation.cached_tokens for p in prompts),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
