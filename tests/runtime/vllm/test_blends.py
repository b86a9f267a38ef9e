from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.blend import UNITS, Blend
from mergeroute.adapters.errors import BlendError
from mergeroute.runtime.vllm.blends import is_blend, is_key, lora_name, module_key, read_name

KEYS = st.text("0123456789abcdef", min_size=32, max_size=32)
WEIGHTS = st.integers(-8 * UNITS, 8 * UNITS).filter(bool).map(lambda units: units / UNITS)


@given(st.dictionaries(KEYS, WEIGHTS, min_size=1, max_size=9))
def test_a_name_is_read_back(weights: dict[str, float]) -> None:
    blend = Blend({f"sha256:{key}{'0' * 32}": weight for key, weight in weights.items()})
    name = lora_name(blend)
    assert is_blend(name)
    assert read_name(name) == Blend(weights)


@given(st.dictionaries(KEYS, WEIGHTS, min_size=2, max_size=5))
def test_equal_blends_have_equal_names(weights: dict[str, float]) -> None:
    backwards = dict(reversed(weights.items()))
    assert lora_name(Blend(weights)) == lora_name(Blend(backwards))


@pytest.mark.parametrize(
    "name",
    [
        "blend:none",
        "blend:",
        "blend:m0=1",
        f"blend:{'A' * 32}=1",
        f"blend:{'a' * 31}/=1",
        f"blend:{'b' * 32}=1,{'a' * 32}=1",
        f"blend:{'a' * 32}=1.0",
        f"blend:{'a' * 32}=0",
        f"blend:{'a' * 32}=nan",
        f"{'a' * 32}=1",
    ],
)
def test_what_we_did_not_write_is_refused(name: str) -> None:
    with pytest.raises(BlendError):
        read_name(name)


def test_a_key_is_half_a_digest() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    assert module_key(digest) == "0123456789abcdef" * 2
    assert is_key(module_key(digest))
    assert not is_key(digest)
