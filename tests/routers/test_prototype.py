"""The prototype scorer against textbook formulas, and its calibration against fresh data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.prototype import Prototype, ledoit_wolf

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


def test_scores_are_half_negative_squared_mahalanobis_distances() -> None:
    features, labels = draw(50, seed=1)
    scorer = Prototype.fit(features, labels, modules=MODULES)
    rows = features.double().view(3, 50, 8)
    means = rows.mean(1)
    covariance = ledoit_wolf((rows - means[:, None]).reshape(-1, 8))
    x = features[7].double()
    for k, name in enumerate(MODULES):
        difference = x - means[k]
        expected = -0.5 * difference @ torch.linalg.solve(covariance, difference)
        assert scorer.score(features[7]).logits[name] == pytest.approx(float(expected), rel=1e-3)


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
    threshold = scorer.calibration[int(len(scorer.calibration) * 0.95)]
    rejected = [s.distance is not None and s.distance > threshold for s in scores]
    assert 0.02 < sum(rejected) / len(rejected) < 0.09
    far = scorer.score(torch.full((8,), 100.0))
    assert far.distance is not None
    assert far.distance > scorer.calibration[-1]


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
    assert first.calibration == second.calibration
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
    assert sum(scorer.calibration) > 1.2 * sum(in_sample)


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


def test_prompts_that_are_all_alike_are_refused() -> None:
    features = torch.zeros(10, 4)
    with pytest.raises(RouterError, match="all alike"):
        Prototype.fit(features, ["m0"] * 5 + ["m1"] * 5, modules=("m0", "m1"))
