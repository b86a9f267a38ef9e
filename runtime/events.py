"""What the caller of a sequence is told of each of its tokens."""

from __future__ import annotations

from .sampling import Sampled
from .scheduler import Sequence
from .types import FinishReason, TokenEvent


def token_event(sequence: Sequence, sampled: Sampled) -> TokenEvent:
    """What to tell of a token that was appended; an end token shows no text."""
    token, text = sampled.token_id, sequence.text
    if token in sequence.end_tokens:
        shown = text.flush() if text else ""
        told = sampled.logprob, sampled.top_logprobs
        return TokenEvent(token, shown, *told, finish_reason=FinishReason.STOP, is_end=True)
    shown = text.push(token) if text else ""
    reason = None
    if text and text.is_stopped:
        reason = FinishReason.STOP
    elif sequence.sampling.constraint and sequence.sampling.constraint.is_over:
        shown += text.flush() if text else ""
        reason = FinishReason.STOP
    elif sequence.generated >= sequence.limit:
        shown += text.flush() if text else ""
        reason = FinishReason.LENGTH
    return TokenEvent(token, shown, sampled.logprob, sampled.top_logprobs, reason)
