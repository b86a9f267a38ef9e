"""What a response tells of its prompt: token ids and log-probabilities, in vLLM's shapes, and the
echo of OpenAI's completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..runtime.types import ScoredToken, TokenEvent, TokenLogprob
from .choices import Choice
from .token_text import TokenTexts

_LEAST = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


@dataclass(frozen=True)
class ShownToken:
    """A token as logprobs show it.

    logprob: None of a prompt's first token, which nothing precedes. top: the best, best first.
    """

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


def generated(events: Iterable[TokenEvent]) -> Iterator[ShownToken]:
    """The tokens of events that have log-probabilities."""
    for event in events:
        if event.logprob is not None:
            yield _shown(event.logprob, event.top_logprobs)


def echoed(choice: Choice) -> Iterator[ShownToken]:
    """The tokens of a choice's prompt, once it is scored."""
    yield ShownToken(choice.assignment.prompt.token_ids[0], None)
    for scored in choice.generation.prompt_scores:
        yield _shown(scored.logprob, scored.top_logprobs)


def echoed_text(choice: Choice) -> str:
    """The prompt as it was given; of token ids, what they decode to."""
    return "".join(turn.text for turn in choice.assignment.prompt.turns)


def prompt_fields(choice: Choice, texts: TokenTexts) -> dict[str, Any]:
    """What vLLM tells of a prompt, as far as it is asked for."""
    body, fields = choice.body, {}
    if body.prompt_logprobs is not None:
        fields["prompt_logprobs"] = _prompt_logprobs(choice, body.prompt_logprobs, texts)
    if body.return_token_ids:
        fields["prompt_token_ids"] = list(choice.assignment.prompt.token_ids)
    return fields


def _prompt_logprobs(choice: Choice, count: int, texts: TokenTexts) -> list[Any]:
    """Of each token, by id, the token itself and the best `count`; null of the first."""
    scores = choice.generation.prompt_scores
    return [None, *(_entry(scored, count, texts) for scored in scores)]


def _entry(scored: ScoredToken, count: int, texts: TokenTexts) -> dict[str, Any]:
    ranked = [(scored.logprob, scored.rank)]
    ranked += [(top, rank) for rank, top in enumerate(scored.top_logprobs[:count], 1)]
    return {
        str(token.token_id): {
            "logprob": max(token.logprob, _LEAST),
            "rank": rank,
            "decoded_token": texts[token.token_id].text,
        }
        for token, rank in ranked
    }


def _shown(token: TokenLogprob, top: tuple[TokenLogprob, ...]) -> ShownToken:
    return ShownToken(token.token_id, max(token.logprob, _LEAST), top)
