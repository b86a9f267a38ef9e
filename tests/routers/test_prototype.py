"""The prototype scorer against textbook formulas, and its calibration against fresh data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.covariance import ledoit_wolf
from mergeroute.routers.prototype import Prototype

MODULES = ("m0", "m1", "m2")


def draw(count: int, *, seed: int) -> tuple[Tensor, list[str]]:
    """Three Gaussian classes with a common, correlated covariance in 8 dimensions."""
    fixed = torch.Generator().manual_seed(0)
    means = torch.randn(3, 8, generator=fixed) * 4
    mix = torch.randn(8, 8, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3 * count, 8, generator=generator) @ mix
    labels = [name for name in MODULES for _ in range(count)]
    return means.repeat_interleave(count, 0) + noise, labels


def draw_none(count: int, *, seed: int, centers: int = 4) -> Tensor:
    """Prompts of no module, about several places of their own."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(centers, 8, generator=torch.Generator().manual_seed(99)) * 12
    which = torch.arange(count) % centers
    return places[which] + torch.randn(count, 8, generator=generator)


def test_scores_are_half_negative_squared_mahalanobis_distances() -> None:
    features, labels = draw(50, seed=1)
    scorer = Prototype.fit(features, labels, modules=MODULES)
    centred = features.double() - features.double().mean(0)
    rare = 3 * centred.abs().amax(0).square() / 149  # three prompts more, as far as the farthest
    variance = centred.square().sum(0) / 149 + rare
    scaled = centred / variance.sqrt()
    rows = scaled.view(3, 50, 8)
    means = rows.mean(1)
    residuals = (rows - means[:, None]).reshape(-1, 8)
    covariance = ledoit_wolf(residuals) + torch.diag(rare / variance)
    squares = (residuals * torch.linalg.solve(covariance, residuals.T).T).sum(1)
    too_far = squares.sum() / (150 - 3) / 50  # a mean of 50 lies beside the true one
    for k, name in enumerate(MODULES):
        difference = scaled[7] - means[k]
        square = difference @ torch.linalg.solve(covariance, difference) - too_far
        expected = -0.5 * float(square) / scorer.calibration.temperature
        assert scorer.score(features[7]).logits[name] == pytest.approx(expected, rel=1e-6)


def test_prompts_of_no_module_have_means_of_their_own_and_are_told_by_log_odds() -> None:
    features, labels = draw(100, seed=1)
    scorer = Prototype.fit(features, labels, modules=MODULES, none=draw_none(120, seed=1))
    assert (scorer.owners == -1).sum() == 5
    for x in (features[3], draw_none(1, seed=7)[0]):
        scores = scorer.score(x)
        assert scores.none is not None
        assert scores.distance is not None
        odds = (scores.none - max(scores.logits.values())) * scorer.calibration.temperature
        assert scores.distance == pytest.approx(odds, rel=1e-9)
    assert all((scorer.score(x).distance or 0) > 0 for x in draw_none(40, seed=3))
    assert all((scorer.score(x).distance or 0) < 0 for x in draw(30, seed=3)[0])
    assert min(scorer.calibration.distances) >= 0
    assert list(scorer.calibration.distances) == sorted(scorer.calibration.distances)


def test_without_prompts_of_no_module_nothing_is_said_of_them() -> None:
    scorer = Prototype.fit(*draw(20, seed=1), modules=MODULES)
    assert scorer.score(draw(1, seed=2)[0][0]).none is None
    assert not (scorer.owners == -1).any()


def test_a_module_of_two_kinds_of_prompts_takes_two_means() -> None:
    features, labels = draw(60, seed=1)
    features[:30] += 40
    two = Prototype.fit(features, labels, modules=MODULES, centroids=2)
    assert [(two.owners == k).sum().item() for k in range(3)] == [2, 2, 2]
    one = Prototype.fit(features, labels, modules=MODULES)
    between = features[:60].mean(0)  # where a single mean stands, and no prompt does
    assert (two.score(between).distance or 0) > 100 * (one.score(between).distance or 1)
    for x in (features[0], features[45]):
        logits = two.score(x).logits
        assert max(logits, key=lambda name: logits[name]) == "m0"


def test_a_mean_stands_for_two_prompts_at_least() -> None:
    features, labels = draw(5, seed=1)
    scorer = Prototype.fit(features, labels, modules=MODULES, centroids=40)
    assert all((scorer.owners == k).sum() <= 2 for k in range(3))


@pytest.mark.parametrize("with_none", [False, True])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_modules_come_and_go_and_others_logits_stay_to_the_last_bit(
    with_none: bool, data: st.DataObject
) -> None:
    scorer = PROTOTYPES[with_none]
    seed = data.draw(st.integers(0, 50))
    prompt = torch.randn(8, generator=torch.Generator().manual_seed(seed)) * 5
    samples = draw_none(data.draw(st.integers(1, 12)), seed=seed, centers=1)
    grown = scorer.with_module("new", samples)
    gone = data.draw(st.sampled_from(MODULES))
    for other in (grown, grown.without_module(gone), scorer.without_module(gone)):
        before, after = scorer.score(prompt), other.score(prompt)
        for name in set(after.logits) - {"new"}:
            assert after.logits[name] == before.logits[name]
        assert after.none == before.none
    back = grown.without_module("new")
    assert back.score(prompt) == scorer.score(prompt)
    assert back.modules == scorer.modules


def test_an_added_module_takes_its_prompts_and_says_by_what_it_is_known() -> None:
    scorer = PROTOTYPES[True].with_module("new", draw_none(10, seed=5, centers=1))
    assert scorer.modules == (*MODULES, "new")
    for x in draw_none(20, seed=6, centers=1):
        scores = scorer.score(x)
        assert max(scores.logits, key=lambda name: scores.logits[name]) == "new"
        assert scores.basis == {"new": "10 samples"}
    again = scorer.with_module("new", draw_none(1, seed=5, centers=1))
    assert again.modules == scorer.modules
    assert again.basis == {"new": "1 sample"}
    assert scorer.without_module("new").basis == {}
    assert scorer.without_module("absent") is scorer


def test_without_modules_there_is_no_opinion() -> None:
    scorer = PROTOTYPES[True]
    for name in MODULES:
        scorer = scorer.without_module(name)
    assert scorer.score(torch.zeros(8)).logits == {}


@pytest.mark.parametrize("with_none", [False, True])
def test_a_saved_head_scores_alike(with_none: bool) -> None:
    scorer = PROTOTYPES[with_none]
    back = Prototype.from_state(scorer.state(), MODULES)
    for x in draw(5, seed=8)[0]:
        before, after = scorer.score(x), back.score(x)
        assert after.logits == pytest.approx(before.logits, rel=1e-4, abs=1e-4)
        assert after.distance == pytest.approx(before.distance, rel=1e-4, abs=1e-4)
        assert after.calibration == before.calibration
    assert Prototype.from_state(back.state(), MODULES).score(x) == back.score(x)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("means", None, "lacks tensor 'means'"),
        ("means", lambda t: t[:-1], "do not fit 3 modules"),
        ("means", lambda t: t[:, 0], "do not fit 3 modules"),
        ("means", lambda t: t[:, None], "do not fit 3 modules"),
        ("means", lambda t: t.to(torch.complex64), "other dtypes"),
        ("spread", lambda t: t.half(), "other dtypes"),
        ("owners", lambda t: t.float(), "other dtypes"),
        ("owners", lambda t: t.bool(), "other dtypes"),
        ("owners", lambda t: t + 1, "do not fit 3 modules"),
        ("center", lambda t: t[:3], "do not fit 3 modules"),
        ("whitening", lambda t: t * torch.nan, "NaN or inf"),
        ("means", lambda t: t / 0, "NaN or inf"),
        ("temperature", lambda t: t * 0, "calibration is damaged"),
        ("calibration", lambda t: t + torch.inf, "calibration is damaged"),
    ],
)
def test_damaged_tensors_are_refused(
    key: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    state = PROTOTYPES[True].state()
    tensor = state.pop(key)
    if change:
        state[key] = change(tensor)
    with pytest.raises(RouterError, match=message):
        Prototype.from_state(state, MODULES)


def test_ledoit_wolf_shrinks_little_data_and_trusts_much() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    truth = mix.T @ mix

    def error(count: int) -> tuple[float, float]:
        rows = torch.randn(count, 8, generator=generator, dtype=torch.float64) @ mix
        rows -= rows.mean(0)
        plain = rows.T @ rows / count
        return float((ledoit_wolf(rows) - truth).norm()), float((plain - truth).norm())

    shrunk, plain = (sum(errors) for errors in zip(*(error(6) for _ in range(50)), strict=True))
    assert shrunk < plain
    rows = torch.randn(20000, 8, generator=generator, dtype=torch.float64) @ mix
    sample = rows.T @ rows / 20000
    assert (ledoit_wolf(rows) - sample).norm() < 0.01 * sample.norm()


def test_fresh_prompts_go_to_their_module_and_are_rejected_at_the_calibrated_rate() -> None:
    scorer = Prototype.fit(*draw(200, seed=1), modules=MODULES)
    features, labels = draw(500, seed=2)
    scores = [scorer.score(x) for x in features]
    right = [
        max(s.logits, key=lambda m: s.logits[m]) == y for s, y in zip(scores, labels, strict=True)
    ]
    assert sum(right) / len(right) > 0.99
    threshold = scorer.calibration.distances[int(len(scorer.calibration.distances) * 0.95)]
    rejected = [s.distance is not None and s.distance > threshold for s in scores]
    assert 0.02 < sum(rejected) / len(rejected) < 0.09
    far = scorer.score(torch.full((8,), 100.0))
    assert far.distance is not None
    assert far.distance > scorer.calibration.distances[-1]


def test_more_dimensions_than_prompts_work() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(15, 64, generator=generator)
    features[:5, 0] += 30
    labels = ["m0"] * 5 + ["m1"] * 5 + ["m2"] * 5
    scorer = Prototype.fit(features, labels, modules=MODULES)
    logits = scorer.score(features[0]).logits
    assert max(logits, key=lambda m: logits[m]) == "m0"


def test_the_fit_does_not_depend_on_chance() -> None:
    features, labels = draw(30, seed=3)
    first, second = (Prototype.fit(features, labels, modules=MODULES) for _ in range(2))
    assert first.calibration.distances == second.calibration.distances
    assert torch.equal(first.means, second.means)


def test_bad_labels_are_refused() -> None:
    features, labels = draw(10, seed=1)
    with pytest.raises(RouterError, match="'other', no module"):
        Prototype.fit(features, ["other", *labels[1:]], modules=MODULES)
    with pytest.raises(RouterError, match="'m3' has 0 prompts"):
        Prototype.fit(features, labels, modules=(*MODULES, "m3"))


def test_calibration_is_measured_on_prompts_that_were_held_out() -> None:
    features, labels = draw(10, seed=4)
    scorer = Prototype.fit(features, labels, modules=MODULES)
    in_sample = sorted(s for x in features if (s := scorer.score(x).distance) is not None)
    assert sum(scorer.calibration.distances) > 1.2 * sum(in_sample)


def test_distances_stay_exact_far_from_the_origin_with_many_modules() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"m{k}" for k in range(40)]
    means = torch.randn(40, 8, generator=generator).double() * 5
    rows = means.repeat_interleave(20, 0) + torch.randn(800, 8, generator=generator)
    labels = [name for name in names for _ in range(20)]
    near = Prototype.fit(rows, labels, modules=names)
    far = Prototype.fit(rows + 300, labels, modules=names)
    for x in rows[::50]:
        expected = near.score(x).distance
        assert far.score(x + 300).distance == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("with_none", [False, True])
@settings(deadline=None, max_examples=15)
@given(powers=st.lists(st.integers(-40, 40), min_size=8, max_size=8))
def test_the_unit_of_a_feature_does_not_matter(with_none: bool, powers: list[int]) -> None:
    units = 2.0 ** torch.tensor(powers)  # powers of two, so that nothing is rounded
    features, labels = draw(40, seed=1)
    none = draw_none(60, seed=2) if with_none else None
    other = Prototype.fit(
        features * units, labels, modules=MODULES, none=None if none is None else none * units
    )
    scorer = PROTOTYPES[with_none]
    assert other.calibration == scorer.calibration
    for x in (*draw(2, seed=8)[0], *draw_none(4, seed=9)):
        assert other.score(x * units) == scorer.score(x)


def test_weak_features_beside_strong_ones_still_tell_modules_apart() -> None:
    features, labels = draw(40, seed=1)
    strong = torch.randn(120, 8, generator=torch.Generator().manual_seed(5)) * 1e4
    scorer = Prototype.fit(torch.cat([features * 0.01, strong], 1), labels, modules=MODULES)
    for x, label in zip(*draw(20, seed=2), strict=True):
        logits = scorer.score(torch.cat([x * 0.01, strong[0]])).logits
        assert max(logits, key=lambda name: logits[name]) == label


@pytest.mark.parametrize("constant", [0.0, 3.0, -1e6, 1e-8])
def test_a_feature_that_is_always_the_same_but_for_rounding_says_nothing(constant: float) -> None:
    features, labels = draw(40, seed=1)
    noise = torch.randn(120, 1, generator=torch.Generator().manual_seed(5)).clamp(-3, 3)
    same = constant * (1 + 5e-8 * noise)
    scorer = Prototype.fit(torch.cat([features, same], 1), labels, modules=MODULES)
    for x in draw(3, seed=8)[0]:
        expected = PROTOTYPES[False].score(x)
        for unseen in (constant, 1.0, 1e9):
            scores = scorer.score(torch.cat([x, torch.tensor([unseen])]))
            assert max(scores.logits, key=lambda name: scores.logits[name]) == max(
                expected.logits, key=lambda name: expected.logits[name]
            )
            assert scores.distance == pytest.approx(expected.distance, rel=0.2)


def test_a_feature_of_one_prompt_does_not_rule_the_next_prompt_that_has_it() -> None:
    features, labels = draw(400, seed=1)
    rare = torch.zeros(1200, 1)
    rare[7] = 0.5
    scorer = Prototype.fit(torch.cat([features, rare], 1), labels, modules=MODULES)
    for x in draw(10, seed=8)[0]:
        plain, with_it = (
            scorer.score(torch.cat([x, torch.tensor([value])])) for value in (0.0, 0.5)
        )
        assert plain.distance is not None
        assert with_it.distance is not None
        # as if four of 1200 prompts had it: 300, and not 1200
        assert 250 < with_it.distance - plain.distance < 320


@pytest.mark.parametrize("different", [2, 3, 7])
def test_prompts_that_are_given_several_times_are_fitted_silently(different: int) -> None:
    features, labels = draw(different, seed=1)
    features = features.view(3, different, 8).repeat(1, 10, 1).flatten(0, 1)
    labels = [name for name in MODULES for _ in range(10 * different)]
    none = draw_none(different, seed=2).repeat(40, 1)
    scorer = Prototype.fit(features, labels, modules=MODULES, none=none, centroids=5)
    assert 1 <= (scorer.owners == -1).sum() <= different
    for x, label in zip(features, labels, strict=True):
        logits = scorer.score(x).logits
        assert max(logits, key=lambda name: logits[name]) == label


def test_prompts_that_are_all_alike_are_refused() -> None:
    features = torch.zeros(10, 4)
    with pytest.raises(RouterError, match="all alike"):
        Prototype.fit(features, ["m0"] * 5 + ["m1"] * 5, modules=("m0", "m1"))


PROTOTYPES = {
    with_none: Prototype.fit(
        *draw(40, seed=1), modules=MODULES, none=draw_none(60, seed=2) if with_none else None
    )
    for with_none in (False, True)
}
"""Fitted once: no test changes one."""
