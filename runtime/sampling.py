"""From logits to tokens, for a batch whose rows each have their own parameters."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .grammar import Constraint, allowed_tokens
from .types import SamplingParams, TokenLogprob


@dataclass
class SamplingState:
    """What sampling knows of one sequence. tokens: prompt and generated, growing.
    end_tokens: ids that end it. constraint: what may come next; None: anything.
    """

    params: SamplingParams
    tokens: list[int]
    prompt_length: int
    end_tokens: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    def draw(self) -> float:
        """A number in [0, 1) that depends on the seed and the position alone, so that a seeded
        request gets the same tokens whatever else is in the batch.
        """
        return random.Random(f"{self.seed}:{len(self.tokens)}").random()


@dataclass(frozen=True)
class Sampled:
    """A token and, when asked for, log-probabilities under the unmodified logits."""

    token_id: int
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled | None]:
    """Choose a token per row; None where the logits hold NaN or +inf, or no finite value for any
    token that may be drawn.

    logits: [n, vocabulary], any float dtype; computed in float32.
    """
    logits = logits.float()
    adjusted = _constrain(_adjust(logits, states), states)  # before the device is waited for
    best = torch.stack([logits.amax(-1), adjusted.amax(-1)])  # NaN wins every maximum
    is_sound = best.isfinite().all(0).tolist()
    tokens = adjusted.argmax(-1)
    random_rows = [i for i, s in enumerate(states) if is_sound[i] and not s.params.is_greedy]
    if random_rows:
        chosen = [states[i] for i in random_rows]
        tokens[random_rows] = _draw(adjusted[random_rows], chosen)
    return _report(logits, tokens.tolist(), states=states, is_sound=is_sound)


def _adjust(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Bias and penalties, as OpenAI and Keskar et al. 2019 (CTRL, section 4.1) define them."""
    rows = [i for i, state in enumerate(states) if state.params.adjusts_logits]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        _adjust_row(logits[row], states[row])
    return logits


def _adjust_row(row: Tensor, state: SamplingState) -> None:
    params = state.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(state.tokens)), device=row.device)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    generated = state.tokens[state.prompt_length :]
    if generated and (params.frequency_penalty or params.presence_penalty):
        counts = torch.bincount(torch.tensor(generated), minlength=row.shape[0]).to(row.device)
        row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    if len(generated) < params.min_tokens:
        row[[token for token in state.end_tokens if token < len(row)]] = -torch.inf
    largest = torch.finfo(row.dtype).max
    row.clamp_(-largest, largest)  # a huge bias must not leave inf, of which no softmax can be had


def _constrain(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """What a grammar does not allow cannot be drawn, whatever its logit."""
    constraints = {i: s.constraint for i, s in enumerate(states) if s.constraint}
    if not constraints:
        return logits
    rows = list(constraints)
    adjusted = logits.clone()
    allowed = allowed_tokens(list(constraints.values()), logits[rows])
    adjusted[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
    return adjusted


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Inverse-CDF sampling over the sorted distribution, [n] token ids.

    Temperature first, then min_p, top_k and top_p over what is left, as vLLM orders them.
    """
    params = [state.params for state in states]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    below_best = logits.double() - logits.double().amax(-1, keepdim=True)  # the best stays finite
    sharp = below_best / column([p.temperature for p in params])
    ordered, token_ids = sharp.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    probabilities[probabilities < column([p.min_p for p in params]) * probabilities[:, :1]] = 0
    ranks = torch.arange(logits.shape[1], device=logits.device)
    probabilities[ranks >= column([p.top_k or logits.shape[1] for p in params])] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= column([p.top_p for p in params])] = 0
    cumulative = probabilities.cumsum(-1)
    target = column([state.draw() for state in states]) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last_allowed = (probabilities > 0).sum(-1, keepdim=True) - 1
    return token_ids.gather(1, torch.minimum(index, last_allowed))[:, 0]


def _report(
    logits: Tensor,
    tokens: Sequence[int],
    *,
    states: Sequence[SamplingState],
    is_sound: Sequence[bool],
) -> list[Sampled | None]:
    reported: list[Sampled | None] = []
    for row, (token, state) in enumerate(zip(tokens, states, strict=True)):
        count = state.params.top_logprobs
        if not is_sound[row]:
            reported.append(None)
        elif count is None:
            reported.append(Sampled(token))
        else:
            reported.append(_with_logprobs(logits[row].log_softmax(-1), token, count))
    return reported


def _with_logprobs(logprobs: Tensor, token: int, count: int) -> Sampled:
    values, ids = logprobs.topk(min(count, logprobs.shape[0]))
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return Sampled(
        token,
        TokenLogprob(token, float(logprobs[token])),
        tuple(TokenLogprob(token_id, value) for token_id, value in top),
    )
