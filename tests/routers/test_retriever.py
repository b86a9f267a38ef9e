"""The retriever against slow formulas, and modules that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Card, Query
from mergeroute.routers.entries import left_out_similarities, similarities
from mergeroute.routers.retriever import Retriever

MODULES = ("m0", "m1", "m2")
WIDTH = 16


@dataclass(frozen=True)
class Numbers:
    """A signal for tests: the text is the vector."""

    read_before: list[str] = field(default_factory=list)

    def read(self, queries: Sequence[Query]) -> Tensor:
        self.read_before.extend(query.text for query in queries)
        return torch.tensor([[float(x) for x in query.text.split()] for query in queries])


def query(vector: Tensor) -> Query:
    return Query.of(text=" ".join(map(str, vector.tolist())))


def draw(cluster: int, count: int, *, seed: int, spread: float = 0.5) -> Tensor:
    """Vectors about one of four fixed directions, of any length."""
    means = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return means[cluster] * 3 + spread * 3 * torch.randn(count, WIDTH, generator=generator)


def description(cluster: int) -> str:
    """In another place than the prompts, as sentences about prompts are."""
    return query(draw(cluster, 1, seed=0, spread=0.0)[0] + 6 * torch.eye(WIDTH)[3]).text


def fit(count: int = 20, *, described: Sequence[int] = ()) -> Retriever:
    features = torch.cat([draw(k, count, seed=k) for k in range(3)])
    return Retriever.fit(
        Numbers(),
        features,
        [name for name in MODULES for _ in range(count)],
        modules=MODULES,
        descriptions={MODULES[k]: description(k) for k in described},
    )


def best(scorer: Retriever, vector: Tensor) -> str:
    logits = scorer.score(query(vector)).logits
    return max(logits, key=lambda name: logits[name])


def slow_similarity(prompt: Tensor, samples: Tensor) -> float:
    """By sorting, sample by sample."""
    units = [sample / sample.norm() for sample in samples]
    unit = prompt / prompt.norm()
    nearest = sorted(units, key=lambda sample: -float(sample @ unit))[:10]
    mean = sum(nearest, torch.zeros(WIDTH)) / len(nearest)
    return float(unit @ mean / mean.norm())


@pytest.mark.parametrize("count", [1, 3, 10, 40])
def test_scores_are_the_formula(count: int) -> None:
    scorer = fit(count)
    prompt = draw(1, 1, seed=9)[0]
    scores = scorer.score(query(prompt))
    found = [slow_similarity(prompt, draw(k, count, seed=k)) for k in range(3)]
    for name, similarity in zip(MODULES, found, strict=True):
        assert scores.logits[name] * scorer.temperature == pytest.approx(similarity, abs=1e-5)
    assert scores.distance == pytest.approx(1 - max(found), abs=1e-5)


@pytest.mark.parametrize("count", [2, 7, 30])
def test_every_sample_is_left_out_of_its_own_similarity(count: int) -> None:
    samples = torch.nn.functional.normalize(draw(0, count, seed=1))
    found = left_out_similarities(samples)
    for k in range(count):
        rest = torch.cat([samples[:k], samples[k + 1 :]])
        assert float(found[k]) == pytest.approx(slow_similarity(samples[k], rest), abs=1e-5)


def test_many_samples_are_compared_in_parts() -> None:
    samples = torch.nn.functional.normalize(draw(0, 1100, seed=1))
    found = left_out_similarities(samples)
    for k in (0, 511, 512, 1099):
        rest = torch.cat([samples[:k], samples[k + 1 :]])
        expected = similarities(samples[k : k + 1], rest)
        assert float(found[k]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("count", [3, 30])
def test_fresh_prompts_go_to_their_module(count: int) -> None:
    scorer = fit(count)
    right = [best(scorer, x) == MODULES[k] for k in range(3) for x in draw(k, 50, seed=7)]
    assert sum(right) / len(right) > 0.97


def test_a_module_of_two_kinds_is_found_by_both() -> None:
    """The mean of both kinds alone would lie where no prompt is."""
    two = torch.cat([draw(0, 20, seed=1), -draw(0, 20, seed=2)])
    features = torch.cat([two, draw(1, 40, seed=3)])
    labels = ["two"] * 40 + ["one"] * 40
    scorer = Retriever.fit(Numbers(), features, labels, modules=("two", "one"))
    fresh = torch.cat([draw(0, 20, seed=5), -draw(0, 20, seed=6)])
    assert sum(best(scorer, x) == "two" for x in fresh) >= 39


def test_the_calibrated_share_of_fresh_prompts_is_rejected_and_what_is_unlike_is() -> None:
    scorer = fit(100)
    assert len(scorer.calibration) == 300
    assert list(scorer.calibration) == sorted(scorer.calibration)
    threshold = scorer.calibration[int(300 * 0.95)]
    found = [scorer.score(query(x)).distance or 0.0 for k in range(3) for x in draw(k, 80, seed=8)]
    assert 0.01 < sum(d > threshold for d in found) / len(found) < 0.1
    unlike = [scorer.score(query(x)).distance or 0.0 for x in draw(3, 80, seed=8)]
    assert sum(d > threshold for d in unlike) / len(unlike) > 0.95


def test_the_temperature_tells_how_often_the_best_is_right() -> None:
    scorer = Retriever.fit(
        Numbers(),
        torch.cat([draw(k, 50, seed=k, spread=2.5) for k in range(3)]),
        [name for name in MODULES for _ in range(50)],
        modules=MODULES,
    )
    assert scorer.temperature > fit().temperature
    rows = [(k, x) for k in range(3) for x in draw(k, 100, seed=5, spread=2.5)]
    logits = [torch.tensor([*scorer.score(query(x)).logits.values()]) for _, x in rows]
    shares = torch.stack(logits).softmax(1)
    right = torch.tensor([float(z.argmax() == k) for (k, _), z in zip(rows, logits, strict=True)])
    assert 0.5 < right.mean() < 0.95
    assert abs(float(shares.amax(1).mean() - right.mean())) < 0.06


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 30), gone=st.sampled_from(MODULES), seed=st.integers(0, 99))
def test_others_scores_stay_to_the_last_digit(count: int, gone: str, seed: int) -> None:
    scorer, prompt = fit(), query(draw(seed % 4, 1, seed=seed)[0])
    samples = tuple(query(x) for x in draw(3, count, seed=seed))
    before = scorer.score(prompt).logits
    grown = scorer.with_module(Card("new", samples))
    assert {n: z for n, z in grown.score(prompt).logits.items() if n != "new"} == before
    shrunk = scorer.without_module(gone)
    assert shrunk.score(prompt).logits == {n: z for n, z in before.items() if n != gone}
    assert grown.without_module("new").score(prompt) == scorer.score(prompt)


def test_a_module_joins_by_ten_samples() -> None:
    samples = tuple(query(x) for x in draw(3, 10, seed=4))
    scorer = fit().with_module(Card("new", samples, description=Query.of(text="unread")))
    assert scorer.modules == (*MODULES, "new")
    assert all(best(scorer, x) == "new" for x in draw(3, 50, seed=5))
    assert all(best(scorer, x) == MODULES[k] for k in range(3) for x in draw(k, 50, seed=5))
    assert scorer.score(samples[0]).basis == {"new": "10 samples"}
    again = scorer.with_module(Card("new", samples[:1]))
    assert again.modules == scorer.modules
    assert again.score(samples[0]).basis == {"new": "1 sample"}


def test_a_module_joins_by_its_description_at_no_disadvantage() -> None:
    scorer = fit(described=(0, 1, 2))
    assert scorer.description_handicap > 0.1
    grown = scorer.with_module(Card("new", description=Query.of(text=description(3))))
    assert all(best(grown, x) == "new" for x in draw(3, 50, seed=5))
    assert all(best(grown, x) == MODULES[k] for k in range(3) for x in draw(k, 50, seed=5))
    assert grown.score(query(draw(3, 1, seed=1)[0])).basis == {"new": "its description"}
    threshold = grown.calibration[int(len(grown.calibration) * 0.99)]
    found = [grown.score(query(x)).distance or 0.0 for x in draw(3, 50, seed=5)]
    assert sum(d > threshold for d in found) < 10


@pytest.mark.parametrize("count", [1, 3, 10])
def test_few_samples_compete_with_many(count: int) -> None:
    """On noisy prompts many samples are far more alike than few: without a handicap none win."""

    def noisy(cluster: int, n: int, seed: int) -> Tensor:
        return draw(cluster, n, seed=seed, spread=1.2)

    features = torch.cat([noisy(k, 200, k) for k in range(3)])
    labels = [name for name in MODULES for _ in range(200)]
    scorer = Retriever.fit(Numbers(), features, labels, modules=MODULES)
    grown = scorer.with_module(Card("new", tuple(query(x) for x in noisy(3, count, 4))))
    entry = grown.entries["new"]
    assert entry.handicap > 0.02
    own = entry.similarities(torch.nn.functional.normalize(noisy(3, 300, 5))).mean()
    levels = [grown.entries[name].level for name in MODULES]
    assert min(levels) - 0.12 < float(own) < max(levels) + 0.12
    again = Retriever.fit(
        Numbers(),
        torch.cat([noisy(3, count, 4), features]),
        ["new"] * count + labels,
        modules=("new", *MODULES),
    )
    assert again.entries["new"].handicap == pytest.approx(entry.handicap, abs=1e-6)


def test_alike_many_samples_have_no_handicap() -> None:
    assert [entry.handicap for entry in fit().entries.values()] == [0.0, 0.0, 0.0]


def test_a_card_without_anything_changes_nothing() -> None:
    scorer = fit()
    assert scorer.with_module(Card("new")) is scorer


def test_modules_may_be_known_by_descriptions_alone() -> None:
    names = {f"m{k}": description(k) for k in range(3)}
    scorer = Retriever.fit(
        Numbers(), torch.zeros(0, WIDTH), [], modules=MODULES, descriptions=names
    )
    assert all(best(scorer, x) == MODULES[k] for k in range(3) for x in draw(k, 20, seed=5))
    assert scorer.calibration == ()
    assert scorer.description_handicap == 0.0


def test_a_saved_retriever_scores_alike() -> None:
    scorer = fit(described=(0, 1)).with_module(
        Card("new", description=Query.of(text=description(3)))
    )
    back = Retriever.from_state(scorer.state(), scorer.modules, signal=Numbers())
    for k in range(4):
        prompt = query(draw(k, 1, seed=5)[0])
        assert back.score(prompt) == scorer.score(prompt)


def test_without_modules_there_is_no_opinion() -> None:
    scores = Retriever(Numbers(), {}).score(query(draw(0, 1, seed=1)[0]))
    assert scores.logits == {}
    assert scores.distance is None


def test_a_prompt_without_features_is_unlike_everything() -> None:
    scores = fit().score(query(torch.zeros(WIDTH)))
    assert scores.distance == 1.0


def test_bad_samples_are_refused() -> None:
    features = draw(0, 3, seed=0)
    with pytest.raises(RouterError, match="'other', no module"):
        Retriever.fit(Numbers(), features, ["other"] * 3, modules=("m0",))
    with pytest.raises(RouterError, match="'m1' has neither samples nor a description"):
        Retriever.fit(Numbers(), features, ["m0"] * 3, modules=("m0", "m1"))


def test_damaged_tensors_are_refused() -> None:
    state = fit().state()

    def load(**changed: Tensor) -> None:
        Retriever.from_state({**state, **changed}, MODULES, signal=Numbers())

    with pytest.raises(RouterError, match="damaged"):
        Retriever.from_state({}, MODULES, signal=Numbers())
    with pytest.raises(RouterError, match="damaged"):
        load(counts=torch.tensor([20, 20, 21]))
    with pytest.raises(RouterError, match="knows 2 modules, not 3"):
        load(counts=torch.tensor([20, 40]), described=torch.tensor([False, False]))
    with pytest.raises(RouterError, match="not 3"):
        load(counts=torch.tensor([20, 40, 0]))
    crafted = {
        "counts": [
            torch.tensor([20.0, 20.0, 20.0]),
            torch.tensor(60),
            torch.full((2, 2), 15),
            torch.tensor([-1, 41, 20]),
            torch.tensor([1 << 62, 1 << 62, 60]),
        ],
        "described": [torch.tensor([5, 0, 0]), torch.tensor(True), torch.ones(2, dtype=torch.bool)],
        "vectors": [
            state["vectors"][:, 0],
            state["vectors"][:, None],
            state["vectors"][1:],
            state["vectors"].half(),
            state["vectors"].to(torch.complex64),
        ],
        "left_out": [state["left_out"][1:], state["left_out"][None], torch.tensor(1.0)],
        "handicaps": [torch.tensor(1.0), state["handicaps"][1:], state["handicaps"].int()],
        "scale": [torch.tensor(1.0), torch.ones(3), torch.tensor([0.0, 1.0]), -state["scale"]],
    }
    for name, tensors in crafted.items():
        for tensor in tensors:
            with pytest.raises(RouterError, match=r"retriever.* fit it again"):
                load(**{name: tensor})
    with pytest.raises(RouterError, match="NaN or inf"):
        load(vectors=state["vectors"] * torch.nan)
    with pytest.raises(RouterError, match="NaN or inf"):
        load(scale=torch.tensor([0.01, torch.nan]))
