"""Users who differ in how much they ask and in how they score, and experiments on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergeroute.serving.experiments.statistics.units import Kind, Sums

Array = NDArray[np.float64]
LOOKS = 50
ACTIVITY = 1.0  # standard deviation of the logarithm of a user's requests


@dataclass(frozen=True)
class World:
    """How users score. rate: mean score. spread: between users (a Beta's concentration, binary).
    noise: within a user, continuous. leaning: what a user's score rises by per e-fold of activity.
    """

    name: str
    kind: Kind
    rate: float
    spread: float
    noise: float = 0.0
    leaning: float = 0.0

    def users(self, count: int, random: np.random.Generator) -> tuple[Array, Array]:
        """[users] requests a batch on average, and the mean score of each."""
        activity = np.exp(random.normal(0, ACTIVITY, count))
        if self.kind == "binary":
            a, b = self.rate * self.spread, (1 - self.rate) * self.spread
            return activity, random.beta(a, b, count)
        means = random.normal(self.rate, self.spread, count) + self.leaning * np.log(activity)
        return activity, means

    def totals(self, means: Array, requests: Array, random: np.random.Generator) -> Array:
        """[...] the sum of scores of each user's requests."""
        if self.kind == "binary":
            return random.binomial(requests.astype(np.int64), means).astype(np.float64)
        return requests * means + np.sqrt(requests) * self.noise * random.normal(
            size=requests.shape
        )

    def request_variance(self) -> float:
        """Of a single score, between and within users."""
        if self.kind == "binary":
            return self.rate * (1 - self.rate)
        return self.spread**2 + self.noise**2 + (self.leaning * ACTIVITY) ** 2


# correlations within a user: 0.09, 0.09, 0.2
BINARY = World("binary, 10 %", "binary", rate=0.1, spread=10.0)
RARE = World("binary, 1 %", "binary", rate=0.01, spread=10.0)
SCORE = World("continuous", "continuous", rate=1.0, spread=0.5, noise=1.0, leaning=0.1)


def products_of(y: Array, x: Array, z: Array) -> Array:
    """[10, ...] what Sums adds up, in its order."""
    here = (x > 0).astype(np.float64)
    return np.stack([here, y, x, y * y, x * x, x * y, here * z, here * z * z, y * z, x * z])


def as_sums(row: Array) -> Sums:
    """[10] in the order of its fields."""
    return Sums(int(row[0]), *map(float, row[1:]))


def arrivals(
    world: World,
    users: int,
    random: np.random.Generator,
    *,
    change: float = 0.0,
    cuped: bool = False,
) -> Iterator[tuple[Sums, Sums]]:
    """Users who come once, at every look a few more; `change` is added to the variant's means."""
    activity, means = world.users(users, random)
    variant = random.random(users) < 0.5
    requests = 1 + random.poisson(3 * activity).astype(np.float64)
    totals = world.totals(np.clip(means + change * variant, *bounds(world)), requests, random)
    known = pre_period(world, activity, means, random) if cuped else np.zeros(users)
    products = products_of(totals, requests, known)
    yield from zip(*(so_far(products, side) for side in (~variant, variant)), strict=True)


def so_far(products: Array, side: NDArray[np.bool_]) -> list[Sums]:
    """[looks] of one variant. products: [10, users] in the order of their arrival."""
    ends = np.linspace(0, len(side), LOOKS + 1).astype(int)[1:] - 1
    return [as_sums(row) for row in np.cumsum(products * side, axis=1)[:, ends].T]


def returning(world: World, users: int, random: np.random.Generator) -> Iterator[tuple[Sums, Sums]]:
    """Users who come in the first half of the looks and ask again and again."""
    activity, means = world.users(users, random)
    since = random.integers(0, LOOKS // 2, users)
    here = np.arange(LOOKS) >= since[:, None]  # [users, looks]
    requests = random.poisson(activity[:, None] * here).astype(np.float64)
    totals = world.totals(np.broadcast_to(means[:, None], requests.shape), requests, random)
    variant = random.random(users) < 0.5
    products = products_of(totals.cumsum(axis=1), requests.cumsum(axis=1), np.zeros((users, 1)))
    both = [products[:, side].sum(axis=1) for side in (~variant, variant)]
    for look in range(LOOKS):
        yield as_sums(both[0][:, look]), as_sums(both[1][:, look])


def bounds(world: World) -> tuple[float, float]:
    """What means may be."""
    return (0.0, 1.0) if world.kind == "binary" else (-np.inf, np.inf)


def thirds(users: int, random: np.random.Generator) -> Iterator[Mapping[str, Mapping[str, Sums]]]:
    """Users who come once, in one of three variants, measured in every world."""
    chosen = random.integers(3, size=users)
    measured = {}
    for world in (SCORE, BINARY, RARE):
        activity, means = world.users(users, random)
        requests = 1 + random.poisson(3 * activity).astype(np.float64)
        totals = world.totals(means, requests, random)
        products = products_of(totals, requests, np.zeros(users))
        measured[world.name] = {name: so_far(products, chosen == n) for n, name in enumerate("abc")}
    for look in range(LOOKS):
        yield {
            metric: {name: sums[look] for name, sums in each.items()}
            for metric, each in measured.items()
        }


def one_side(
    world: World, count: int, random: np.random.Generator, change: float
) -> tuple[Array, Array, Array]:
    """[users] totals, requests, and the score of a pre-period."""
    activity, means = world.users(count, random)
    known = pre_period(world, activity, means, random)
    requests = 1 + random.poisson(5 * activity).astype(np.float64)
    if world.kind == "binary":  # the same shape around the other rate
        means = means + change * (1 - means) / (1 - world.rate)
        return world.totals(means, requests, random), requests, known
    return world.totals(means + change, requests, random), requests, known


def pre_period(world: World, activity: Array, means: Array, random: np.random.Generator) -> Array:
    """[users] the mean score before, less that of all; 0 for who was not there."""
    requests = random.poisson(5 * activity).astype(np.float64)
    earlier = world.totals(means, requests, random) / np.maximum(requests, 1)
    return np.where(requests > 0, earlier - world.rate, 0.0)


def true_rate(world: World) -> float:
    """The mean over requests, of which a user of activity a has 1 + 5 a: E[a log a] / E[a] is the
    variance of a lognormal's logarithm."""
    mean = np.exp(ACTIVITY**2 / 2)
    return float(world.rate + world.leaning * 5 * mean * ACTIVITY**2 / (1 + 5 * mean))
