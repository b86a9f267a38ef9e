"""The MLP head: what it learns, what it knows not, and that it is the same every time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.mlp import Mlp

MODULES = ("m0", "m1", "m2")
WIDTH = 12


def draw(count: int, *, seed: int, clusters: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """Gaussian clusters about fixed, random means, one after the other."""
    means = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)) * 3
    noise = torch.randn(len(clusters) * count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return means[list(clusters)].repeat_interleave(count, 0) + noise


def labels(count: int) -> list[str]:
    return [name for name in MODULES for _ in range(count)]


@pytest.fixture(scope="module")
def fitted() -> Mlp:
    none = draw(60, seed=3, clusters=(3, 4))
    return Mlp.fit(draw(60, seed=1), labels(60), modules=MODULES, none=none)


def distances(head: Mlp, features: Tensor) -> list[float]:
    found = [head.score(x).distance for x in features]
    return [distance for distance in found if distance is not None]


def test_fresh_prompts_go_to_their_module(fitted: Mlp) -> None:
    for x, name in zip(draw(100, seed=2), labels(100), strict=True):
        logits = fitted.score(x).logits
        assert max(logits, key=lambda m: logits[m]) == name


def test_scores_are_what_the_network_says(fitted: Mlp) -> None:
    x, net = draw(1, seed=2)[0], fitted.network
    rows = layer_norm((x - net.center) / net.scale, (WIDTH,))
    z = gelu(rows @ net.hidden.T + net.hidden_bias) @ net.output.T + net.output_bias
    scores = fitted.score(x)
    for k, name in enumerate(MODULES):
        assert scores.logits[name] == pytest.approx(
            float(z[k]) / fitted.calibration.temperature, rel=1e-4
        )
    assert scores.none == pytest.approx(float(z[3]) / fitted.calibration.temperature, rel=1e-4)
    odds = torch.log(z.softmax(0)[3] / z.softmax(0)[:3].max())
    assert scores.distance == pytest.approx(float(odds), rel=1e-3)


def test_prompts_of_no_module_are_rejected_and_the_modules_own_are_not(fitted: Mlp) -> None:
    assert all(a <= b for a, b in pairwise(fitted.calibration.distances))
    assert len(fitted.calibration.distances) == 180
    threshold = fitted.calibration.distances[int(180 * 0.98)]
    own = distances(fitted, draw(300, seed=5))
    assert sum(d > threshold for d in own) / len(own) < 0.05
    none = distances(fitted, draw(100, seed=6, clusters=(3, 4)))
    assert sum(d > threshold for d in none) / len(none) > 0.95


def test_without_other_prompts_the_calibrated_share_is_rejected() -> None:
    head = Mlp.fit(draw(100, seed=1), labels(100), modules=MODULES)
    own = distances(head, draw(300, seed=5))
    for rate in (0.5, 0.1):
        threshold = head.calibration.distances[int(300 * (1 - rate))]
        assert sum(d > threshold for d in own) / len(own) == pytest.approx(rate, rel=0.6)


def test_without_other_prompts_the_distance_is_the_energy() -> None:
    head = Mlp.fit(draw(40, seed=1), labels(40), modules=MODULES)
    scores = head.score(draw(1, seed=2)[0])
    energy = -math.log(
        sum(math.exp(z * head.calibration.temperature) for z in scores.logits.values())
    )
    assert scores.distance == pytest.approx(energy, rel=1e-4)
    assert len(head.network.output) == 3


def test_one_seed_gives_one_result_whatever_the_global_one() -> None:
    torch.manual_seed(1)
    first = Mlp.fit(draw(10, seed=1), labels(10), modules=MODULES, seed=7)
    torch.manual_seed(2)
    with torch.no_grad():
        second = Mlp.fit(draw(10, seed=1), labels(10), modules=MODULES, seed=7)
    other = Mlp.fit(draw(10, seed=1), labels(10), modules=MODULES, seed=8)
    assert first.calibration.distances == second.calibration.distances
    assert torch.equal(first.network.hidden, second.network.hidden)
    assert not torch.equal(first.network.hidden, other.network.hidden)


def test_temperature_admits_to_labels_that_contradict_each_other() -> None:
    features = draw(60, seed=1)
    wrong = torch.rand(180, generator=torch.Generator().manual_seed(0)) < 0.3
    noisy = [MODULES[k % 3] if wrong[k] else n for k, n in enumerate(labels(60))]
    assert Mlp.fit(features, noisy, modules=MODULES).calibration.temperature > 1.5


def test_features_of_another_scale_weigh_as_much() -> None:
    """A text's vector beside a hidden state a thousand times as large."""
    noise = torch.randn(2, 90, 12, generator=torch.Generator().manual_seed(0)) * 1000
    joined = torch.cat([draw(30, seed=1), noise[0]], 1)
    head = Mlp.fit(joined, labels(30), modules=MODULES)
    best = head.logits(torch.cat([draw(30, seed=2), noise[1]], 1))[0].argmax(1)
    assert (best == torch.arange(3).repeat_interleave(30)).float().mean() > 0.9


@pytest.mark.parametrize("gone", MODULES)
def test_a_module_that_goes_leaves_the_others_to_the_last_digit(fitted: Mlp, gone: str) -> None:
    rest = fitted.without_module(gone)
    assert rest.modules == tuple(name for name in MODULES if name != gone)
    for x in draw(20, seed=9):
        before, after = fitted.score(x).logits, rest.score(x).logits
        assert after == {name: before[name] for name in rest.modules}
    assert fitted.without_module("other") is fitted


def test_without_modules_there_is_no_opinion(fitted: Mlp) -> None:
    empty = fitted.without_module("m0").without_module("m1").without_module("m2")
    scores = empty.score(draw(1, seed=2)[0])
    assert scores.logits == {}
    assert scores.distance is None


def test_it_says_that_it_cannot_grow(fitted: Mlp) -> None:
    with pytest.raises(RouterError, match=r"cannot take module 'new' in .* prototype or retriever"):
        fitted.with_module("new", draw(10, seed=1))


def test_a_saved_head_scores_alike(fitted: Mlp) -> None:
    for head in (fitted, fitted.without_module("m1")):
        back = Mlp.from_state(head.state(), head.modules)
        assert back.score(draw(1, seed=2)[0]) == head.score(draw(1, seed=2)[0])


def test_damaged_tensors_are_refused(fitted: Mlp) -> None:
    state = fitted.state()
    with pytest.raises(RouterError, match="lacks tensor 'output'"):
        Mlp.from_state({k: v for k, v in state.items() if k != "output"}, MODULES)
    with pytest.raises(RouterError, match="do not fit 2 modules"):
        Mlp.from_state(state, MODULES[:2])
    with pytest.raises(RouterError, match="do not fit 3 modules"):
        Mlp.from_state({**state, "hidden": state["hidden"].T.contiguous()}, MODULES)
    with pytest.raises(RouterError, match="do not fit 3 modules"):
        Mlp.from_state({**state, "center": torch.tensor(1.0)}, MODULES)
    for name in ("scale", "hidden", "output_bias"):
        with pytest.raises(RouterError, match=r"torch\.float16, torch\.float32 is allowed"):
            Mlp.from_state({**state, name: state[name].half()}, MODULES)
    for scale in (0.0, -1.0):
        with pytest.raises(RouterError, match="a scale of 0"):
            Mlp.from_state({**state, "scale": state["scale"] * scale}, MODULES)
    damaged = {"hidden": "NaN or inf", "calibration": "is damaged", "temperature": "is damaged"}
    for name, message in damaged.items():
        with pytest.raises(RouterError, match=message):
            Mlp.from_state({**state, name: state[name] * torch.nan}, MODULES)


def test_bad_prompts_are_refused() -> None:
    features = draw(5, seed=1)
    with pytest.raises(RouterError, match="'other', no module"):
        Mlp.fit(features, ["other", *labels(5)[1:]], modules=MODULES)
    with pytest.raises(RouterError, match="'m3' has 0 prompts"):
        Mlp.fit(features, labels(5), modules=(*MODULES, "m3"))
    with pytest.raises(RouterError, match="all alike"):
        Mlp.fit(torch.ones(15, 4), labels(5), modules=MODULES)
