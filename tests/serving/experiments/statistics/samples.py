"""Units for the statistics' tests: users who differ in activity and in score."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mergeroute.serving.experiments.statistics.units import Sums

Array = NDArray[np.float64]


def users(
    count: int, *, seed: int, mean: float = 1.0, binary: bool = False
) -> tuple[Array, Array, Array]:
    """[count] totals, requests, and a number known before, related to the totals."""
    random = np.random.default_rng(seed)
    requests = (1 + random.poisson(3 * np.exp(random.normal(0, 0.7, count)))).astype(np.float64)
    if binary:
        rates = random.beta(10 * mean, 10 * (1 - mean), count)
        totals = random.binomial(requests.astype(int), rates).astype(np.float64)
        return totals, requests, rates
    levels = random.normal(mean, 0.5, count)
    totals = requests * levels + np.sqrt(requests) * random.normal(0, 1, count)
    return totals, requests, levels + random.normal(0, 0.3, count)


def sums(count: int = 400, *, seed: int = 0, mean: float = 1.0, binary: bool = False) -> Sums:
    """Their sums, without the covariate."""
    totals, requests, _ = users(count, seed=seed, mean=mean, binary=binary)
    return Sums.of(totals, requests)


SIZES = st.integers(0, 6)
VALUES = st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e30, -1e60])
COUNTS = st.integers(0, 5).map(float) | st.sampled_from([1.0, 1e9])


@st.composite
def any_sums(draw: st.DrawFn) -> Sums:
    """Sums of anything that can be recorded, none or a single unit among it."""
    size = draw(SIZES)
    y, z = (draw(arrays(np.float64, size, elements=VALUES)) for _ in range(2))
    return Sums.of(y, draw(arrays(np.float64, size, elements=COUNTS)), z)
