"""How likely a prompt's own tokens are: log-probabilities from the forward that prefills it."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from .scheduler import Chunk, Sequence
from .types import ScoredToken, TokenLogprob

_ROWS = 64
"""Rows that are brought to float32 at once: a large vocabulary makes them large."""

Scores = dict[Sequence, list[ScoredToken] | None]
"""Of each sequence whose prompt is scored; None where the logits hold NaN or inf."""


def prompt_scores(chunks: Items[Chunk], logits: Tensor) -> Scores:
    """Score the prompt's tokens that the chunks tell of.

    logits: [n, vocabulary], of the rows that the chunks keep, chunk by chunk.
    """
    scores: Scores = {}
    start = 0
    for chunk in chunks:
        if chunk.scored:
            scores[chunk.sequence] = _chunk_scores(chunk, logits[start : start + chunk.scored])
        start += chunk.kept_rows
    return scores


def _chunk_scores(chunk: Chunk, logits: Tensor) -> list[ScoredToken] | None:
    """Of the tokens that follow the chunk's; the prompt's last token has none to follow."""
    sequence = chunk.sequence
    first = sequence.computed + 1
    targets = sequence.tokens[first : first + chunk.scored]
    count = sequence.sampling.params.prompt_logprobs
    assert count is not None
    scored: list[ScoredToken] = []
    for start in range(0, len(targets), _ROWS):
        part = targets[start : start + _ROWS]
        rows = logits[start : start + len(part)].float()
        if not bool(rows.amax(-1).isfinite().all()):  # NaN wins every maximum
            return None
        scored += score(rows, part, count=count)
    return scored


def score(logits: Tensor, targets: Items[int], *, count: int) -> list[ScoredToken]:
    """The targets under the logits, one a row. logits: [n, vocabulary], float32, finite maxima.

    count: how many of the best tokens to tell of.
    """
    logprobs = logits.log_softmax(-1)
    ids = torch.tensor(list(targets), device=logits.device)[:, None]
    own = logprobs.gather(1, ids)
    ranks = (logprobs > own).sum(-1) + 1
    values, best = logprobs.topk(min(count, logprobs.shape[1]))
    found = zip(targets, own[:, 0].tolist(), ranks.tolist(), strict=True)
    tops = zip(best.tolist(), values.tolist(), strict=True)
    return [
        ScoredToken(TokenLogprob(token, logprob), rank, tuple(map(TokenLogprob, *top)))
        for (token, logprob, rank), top in zip(found, tops, strict=True)
    ]
