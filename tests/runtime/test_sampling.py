"""Sampling against distributions worked out by brute force, one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.adapters.errors import RequestError
from mergeroute.runtime.sampling import SamplingState, sample
from mergeroute.runtime.types import SamplingParams

VOCABULARY = 12
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2
DRAWS = 3000


def state(
    prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), **params: Any
) -> SamplingState:
    return SamplingState(SamplingParams(**params), [*prompt, *generated], len(prompt))


def tokens_of(logits: torch.Tensor, states: list[SamplingState]) -> list[int | None]:
    return [None if s is None else s.token_id for s in sample(logits, states)]


def draw(logits: torch.Tensor, count: int = DRAWS, **params: Any) -> Counter[int | None]:
    states = [state(seed=seed, **params) for seed in range(count)]
    return Counter(tokens_of(logits.expand(count, -1), states))


def distribution(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[int, float]:
    """The slow obvious reference: plain Python, one filter after the other."""
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    shares = {i: w / sum(weights) for i, w in enumerate(weights)}
    best = max(shares.values())
    shares = {i: p for i, p in shares.items() if p >= min_p * best}
    order = sorted(shares, key=lambda i: -shares[i])[: top_k or None]
    total = sum(shares[i] for i in order)
    kept: dict[int, float] = {}
    for i in order:
        if sum(kept.values()) >= top_p:
            break
        kept[i] = shares[i] / total
    return {i: p / sum(kept.values()) for i, p in kept.items()}


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 500},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
    {"top_k": 2, "top_p": 0.99},
    {"temperature": 2.0, "min_p": 0.5, "top_p": 0.5},
]


@pytest.mark.parametrize("params", CASES, ids=repr)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    expected = distribution(LOGITS, **params)
    counts = draw(LOGITS, **params)
    assert set(counts) <= set(expected)
    assert {i for i, p in expected.items() if p > 0.01} <= set(counts)
    squares = sum((counts[i] - DRAWS * p) ** 2 / (DRAWS * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert squares <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9  # chi-square, five sigma


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=10, unique=True),
    st.floats(0.1, 2),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0, 1),
)
def test_only_tokens_of_the_support_are_drawn(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.tensor(values)
    params: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    wider = {**params, "top_p": min(1, top_p + 1e-9), "min_p": min_p * (1 - 1e-9)}
    support = distribution(logits, **wider)
    shares = distribution(logits, temperature=temperature)
    least = min(shares[token] for token in support) * (1 - 1e-9)  # what ties with it may stand in
    assert all(shares[token or 0] >= least for token in draw(logits, 40, **params))


def test_rows_with_different_parameters_do_not_mix() -> None:
    states = [state(seed=k, **params) for params in CASES for k in range(10)]
    states += [state(temperature=0)]
    rows = torch.randn(len(states), VOCABULARY, generator=torch.Generator().manual_seed(1))
    together = tokens_of(rows, states)
    alone = [tokens_of(row[None], [s])[0] for row, s in zip(rows, states, strict=True)]
    backwards = tokens_of(rows.flip(0), states[::-1])[::-1]
    assert together == alone == backwards


def test_seeds_reproduce_and_differ() -> None:
    flat = torch.zeros(1, 1000)

    def run(**params: Any) -> list[int | None]:
        return [tokens_of(flat, [state(generated=(0,) * k, **params)])[0] for k in range(20)]

    assert run(seed=5) == run(seed=5)
    assert run(seed=0) == run(seed=0)
    runs = [run(seed=5), run(seed=6), run(seed=-5), run(seed=2**63), run(), run()]
    assert len(set(map(tuple, runs))) == len(runs)
    assert all(len(set(tokens)) > 15 for tokens in runs)


def test_greedy_takes_the_best_and_ignores_the_rest() -> None:
    best = int(LOGITS.argmax())
    extremes: dict[str, Any] = {"top_k": 2, "top_p": 0.01, "min_p": 1.0, "seed": 3}
    assert tokens_of(LOGITS[None], [state(temperature=0, **extremes)]) == [best]
    assert draw(LOGITS, 50, temperature=0) == {best: 50}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert draw(LOGITS * 50, 20, temperature=temperature) == {int(LOGITS.argmax()): 20}


def order_of(
    logits: torch.Tensor, prompt: tuple[int, ...], generated: tuple[int, ...], **params: Any
) -> list[int]:
    """The order in which greedy takes the tokens when each that was taken is banned: a token's
    place shows its logit after penalties and bias.
    """
    order: list[int] = []
    for _ in range(logits.shape[0]):
        bias = {**params.get("logit_bias", {})}
        for token in order:
            bias[token] = -1e6
        one = state(prompt, generated, temperature=0, **{**params, "logit_bias": bias})
        [best] = tokens_of(logits[None], [one])
        assert best is not None
        order.append(best)
    return order


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.lists(st.integers(0, 7), max_size=6),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.1, 5),
    st.dictionaries(st.integers(0, 7), st.floats(-5, 5), max_size=3),
)
def test_penalties_and_bias_by_hand(
    prompt: list[int],
    generated: list[int],
    frequency: float,
    presence: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    logits = torch.linspace(-3, 3, 8)
    expected = logits.double().tolist()
    for token in {*prompt, *generated}:
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token in range(8):
        count = generated.count(token)
        expected[token] -= frequency * count + (presence if count else 0)
        expected[token] += bias.get(token, 0)
    order = order_of(
        logits,
        tuple(prompt),
        tuple(generated),
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=bias,
    )
    assert sorted(order) == list(range(8))
    values = [expected[token] for token in order]
    assert all(one >= other - 1e-4 for one, other in pairwise(values))


def test_penalties_change_what_is_drawn_and_not_the_logits_given() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    before = logits.clone()
    for params in (
        {"repetition_penalty": 1.5},
        {"logit_bias": {0: -5.0}},
        {"frequency_penalty": 0.2},
        {"presence_penalty": 0.2},
    ):
        plain = state((2,), (0,), temperature=0)
        assert tokens_of(logits, [plain]) == [0]
        assert tokens_of(logits, [state((2,), (0,), temperature=0, **params)]) == [1], params
        assert torch.equal(logits, before)
    only_prompt: dict[str, Any] = {"frequency_penalty": 2.0, "presence_penalty": 2.0}
    assert tokens_of(logits, [state((0, 0, 0), temperature=0, **only_prompt)]) == [0]
    counted: dict[str, Any] = {"frequency_penalty": 0.04}
    assert tokens_of(logits, [state((2,), (0, 0), temperature=0, **counted)]) == [0]
    assert tokens_of(logits, [state((2,), (0, 0, 0), temperature=0, **counted)]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [100.0, 1e6, 1e38, 1e300])
def test_a_huge_bias_forces_or_bans_a_token(bias: float, temperature: float) -> None:
    params: dict[str, Any] = {"temperature": temperature, "seed": 1}
    forced = state(logit_bias={3: bias}, **params)
    banned = state(logit_bias={i: -bias for i in range(VOCABULARY) if i != 5}, **params)
    assert tokens_of(LOGITS.expand(2, -1), [forced, banned]) == [3, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)[None]
    expected = torch.tensor(logits[0].double().tolist(), dtype=torch.float64).log_softmax(0)
    shaped = {"temperature": 0.3, "top_k": 2, "logit_bias": {0: 9.0}, "repetition_penalty": 3.0}
    for params in ({}, shaped, {"temperature": 0.0}):
        [one] = sample(logits, [state(top_logprobs=4, seed=1, **params)])
        assert one is not None
        assert one.logprob is not None
        assert one.logprob.token_id == one.token_id
        assert one.logprob.logprob == pytest.approx(float(expected[one.token_id]), abs=1e-5)
        best = expected.argsort(descending=True)[:4].tolist()
        assert [t.token_id for t in one.top_logprobs] == best
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(
            expected[best].tolist(), abs=1e-5
        )


def test_logprobs_only_when_asked_for() -> None:
    without, zero, many = sample(
        LOGITS.expand(3, -1),
        [state(seed=1), state(seed=1, top_logprobs=0), state(seed=1, top_logprobs=20)],
    )
    assert without is not None
    assert zero is not None
    assert many is not None
    assert without.logprob is None
    assert zero.logprob is not None
    assert (without.top_logprobs, zero.top_logprobs) == ((), ())
    assert len(many.top_logprobs) == VOCABULARY
    assert without.token_id == zero.token_id == many.token_id


@pytest.mark.parametrize(
    "bad",
    [
        torch.full((VOCABULARY,), torch.nan),
        LOGITS.index_fill(0, torch.tensor([7]), torch.nan),
        torch.full((VOCABULARY,), -torch.inf),
        torch.full((VOCABULARY,), torch.inf),
        LOGITS.index_fill(0, torch.tensor([7]), torch.inf),
    ],
    ids=["nan", "one nan", "-inf", "inf", "one inf"],
)
def test_unsound_rows_give_none_and_leave_their_neighbours(bad: torch.Tensor) -> None:
    for params in ({"temperature": 0.0}, {"seed": 3}, {"seed": 3, "logit_bias": {1: 2.0}}):
        row = state(top_logprobs=2, **params)
        [alone] = sample(LOGITS[None], [row])
        assert alone is not None
        rows = torch.stack([LOGITS, bad, LOGITS, bad, LOGITS])
        assert sample(rows, [row] * 5) == [alone, None, alone, None, alone]


def test_a_masked_token_is_never_drawn() -> None:
    logits = LOGITS.index_fill(0, torch.tensor([int(LOGITS.argmax()), 3]), -torch.inf)
    counts = draw(logits, 500, temperature=2.0)
    assert not {int(LOGITS.argmax()), 3} & set(counts)
    assert tokens_of(logits[None], [state(temperature=0)]) == [int(logits.argmax())]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("temperature", [-0.1, 2.1, math.nan, math.inf]),
        ("top_p", [0.0, -0.1, 1.1, math.nan]),
        ("top_k", [-1]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("frequency_penalty", [-2.1, 2.1, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan]),
        ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
        ("logit_bias", [{1: math.nan}, {1: math.inf}]),
        ("stop", [("",), ("a",) * 17]),
        ("top_logprobs", [-1, 21]),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=name) as caught:
            SamplingParams(**{name: value})
        assert caught.value.parameter == name
