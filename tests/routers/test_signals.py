"""Signals: which hidden states are read, and how often."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Query, Turn
from mergeroute.routers.learned import Learned
from mergeroute.routers.mlp import Mlp
from mergeroute.routers.retriever import Retriever
from mergeroute.routers.signals import Cached, HiddenState, Joined, Recency, shortened

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Encoder:
    """Layers whose state of a token is [layer, token id, place]; it keeps what it was asked."""

    asked: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, prompts: Prompts, layers: Sequence[int], /) -> list[Tensor]:
        self.asked.extend(prompts)
        return [
            torch.tensor(
                [[[layer, token, k] for k, token in enumerate(prompt)] for layer in layers],
                dtype=torch.float32,
            )
            for prompt in prompts
        ]


def states(prompt: tuple[int, ...], layers: tuple[int, ...]) -> Tensor:
    return Encoder()([prompt], layers)[0]


tokens = st.lists(st.integers(0, 99), min_size=1, max_size=20).map(tuple)


@given(prompt=tokens)
def test_views_are_put_side_by_side(prompt: tuple[int, ...]) -> None:
    found = states(prompt, (1, 3))
    means = [found[layer].mean(0) for layer in (0, 1)]
    lasts = [found[layer][-1] for layer in (0, 1)]
    for pooling, views in {"mean": means, "last": lasts, "both": means + lasts}.items():
        signal = HiddenState(Encoder(), (1, 3), pooling)
        assert torch.allclose(signal.read([Query.of(prompt)])[0], torch.cat(views))


def test_prompts_are_read_together_and_in_order() -> None:
    signal = HiddenState(Encoder(), (2,))
    prompts: list[tuple[int, ...]] = [(1,), (5, 7, 9), (2, 4)]
    found = signal.read([Query.of(prompt) for prompt in prompts])
    assert found.tolist() == [[2, 1, 0], [2, 7, 1], [2, 3, 0.5]]
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("window", "read"),
    [(2, (0, 9)), (3, (0, 1, 9)), (6, (0, 1, 2, 7, 8, 9)), (10, tuple(range(10)))],
)
def test_the_window_is_the_beginning_and_the_end(window: int, read: tuple[int, ...]) -> None:
    encoder = Encoder()
    HiddenState(encoder, (1,), window=window).read([Query.of(range(10))])
    assert encoder.asked == [read]


@given(text=st.text(), count=st.integers(2, 20))
def test_what_is_shortened_keeps_both_ends(text: str, count: int) -> None:
    found = shortened(text, count)
    assert len(found) == min(count, len(text))
    assert text.startswith(found[: (len(found) + 1) // 2])
    assert text.endswith(found[(len(found) + 1) // 2 :])


def test_only_the_last_turn_is_read() -> None:
    encoder = Encoder()
    HiddenState(encoder, (1,)).read([Query((Turn((1, 2)), Turn((3,))))])
    assert encoder.asked == [(3,)]


def test_bad_settings_and_empty_prompts_are_refused() -> None:
    for layers in ((), (0,), (2, -1)):
        with pytest.raises(RouterError, match="layers"):
            HiddenState(Encoder(), layers)
    with pytest.raises(RouterError, match="pooling 'max' is unknown: mean, last, both"):
        HiddenState(Encoder(), (1,), "max")
    with pytest.raises(RouterError, match="window 1"):
        HiddenState(Encoder(), (1,), window=1)
    with pytest.raises(RouterError, match="empty prompt"):
        HiddenState(Encoder(), (1,)).read([Query.of((1,)), Query.of()])
    for decay in (0.0, 1.0, -0.5):
        with pytest.raises(RouterError, match="recency"):
            Recency(HiddenState(Encoder(), (1,)), decay)


@given(turns=st.lists(tokens, min_size=1, max_size=5), decay=st.floats(0.1, 0.9))
def test_recency_weighs_turns_by_their_age(turns: list[tuple[int, ...]], decay: float) -> None:
    signal = HiddenState(Encoder(), (1,))
    found = Recency(signal, decay).read([Query(tuple(Turn(ids) for ids in turns))])[0]
    total, weights = torch.zeros(3), 0.0
    for age, ids in enumerate(reversed(turns)):
        total += decay**age * signal.read([Query.of(ids)])[0]
        weights += decay**age
    assert torch.allclose(found, total / weights, rtol=1e-4, atol=1e-5)


def test_a_single_turn_has_no_history() -> None:
    signal, query = HiddenState(Encoder(), (1,)), Query.of((3, 4))
    assert torch.equal(Recency(signal, 0.5).read([query]), signal.read([query]))


def test_joined_signals_stand_side_by_side() -> None:
    one, two = HiddenState(Encoder(), (1,)), HiddenState(Encoder(), (2,), "last")
    queries = [Query.of((3, 4)), Query.of((5,))]
    found = Joined((one, two)).read(queries)
    assert torch.equal(found, torch.cat([one.read(queries), two.read(queries)], 1))


def test_a_prompt_is_read_once() -> None:
    encoder = Encoder()
    signal = Cached(HiddenState(encoder, (1,)))
    queries = [Query.of((1, 2)), Query.of((3,)), Query.of((1, 2))]
    first, second = signal.read(queries), signal.read([queries[1]])
    assert encoder.asked == [(1, 2), (3,)]
    assert torch.equal(first, HiddenState(Encoder(), (1,)).read(queries))
    assert torch.equal(second[0], first[1])


def test_a_prompt_is_remembered_without_the_batch_it_was_read_in() -> None:
    @dataclass(frozen=True)
    class Batch:
        def read(self, queries: Sequence[Query]) -> Tensor:
            return torch.ones(len(queries), 3)

    signal = Cached(Batch())
    signal.read([Query.of((token,)) for token in range(50)])
    assert {row.untyped_storage().nbytes() for row in signal._found.values()} == {3 * 4}


def test_prompts_that_differ_in_tokens_or_text_are_different() -> None:
    encoder = Encoder()
    signal = Cached(HiddenState(encoder, (1,)))
    signal.read([Query.of((1,), "a"), Query.of((1,), "b"), Query.of((2,), "a")])
    signal.read([Query((Turn((9,)), Turn((1,), "a")), {"tier": "gold"})])
    assert encoder.asked == [(1,), (1,), (2,)]


def test_the_prompt_that_was_not_read_for_longest_is_forgotten() -> None:
    encoder = Encoder()
    signal = Cached(HiddenState(encoder, (1,)), capacity=2)
    for token in (1, 2, 1, 3, 1, 2):
        signal.read([Query.of((token,))])
    assert encoder.asked == [(1,), (2,), (3,), (2,)]
    many = [Query.of((token,)) for token in range(10, 20)]
    assert torch.equal(signal.read(many), HiddenState(Encoder(), (1,)).read(many))


def test_any_thread_may_read() -> None:
    signal, plain = Cached(HiddenState(Encoder(), (1,)), capacity=8), HiddenState(Encoder(), (1,))
    start = threading.Barrier(8)

    def read(seed: int) -> bool:
        start.wait()
        right = True
        for k in range(200):
            queries = [Query.of(((seed * k + j) % 20, j)) for j in range(4)]
            right &= torch.equal(signal.read(queries), plain.read(queries))
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_scorers_that_share_a_signal_run_one_forward() -> None:
    encoder = Encoder()
    signal = Cached(HiddenState(encoder, (1,)))
    queries = [Query.of((token, 7)) for token in (*range(5), *range(50, 55))]
    labels = ["low"] * 5 + ["high"] * 5
    features = signal.read(queries)
    mlp = Learned(signal, Mlp.fit(features, labels, modules=("low", "high")))
    retriever = Retriever.fit(signal, features, labels, modules=("low", "high"))
    encoder.asked.clear()
    for scorer in (mlp, retriever):
        scores = scorer.score(Query.of((60, 7)))
        assert set(scores.logits) == {"low", "high"}
    assert encoder.asked == [(60, 7)]
