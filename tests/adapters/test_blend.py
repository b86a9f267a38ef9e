"""A blend is a cache key and a response header: canonical, exact, and refused when malformed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import BlendError, MergerouteError

names = st.text(st.characters(codec="utf-8", exclude_characters="=,"), min_size=1).filter(
    lambda name: not any(c.isspace() for c in name)
)
units = st.integers(-512, 512)
blends = st.dictionaries(names, units, max_size=5).map(
    lambda weights: Blend({name: u / 64 for name, u in weights.items()})
)
free_weights = st.floats(-8, 8, allow_nan=False)


@given(st.dictionaries(names, free_weights, max_size=5))
def test_weights_are_snapped_to_the_nearest_64th(weights: dict[str, float]) -> None:
    blend = Blend(weights)
    for name, weight in weights.items():
        kept = Fraction(blend.get(name, 0.0))
        assert (kept * 64).denominator == 1
        assert abs(kept - Fraction(weight)) <= Fraction(1, 128)
    assert set(blend) <= set(weights)


@given(st.dictionaries(names, free_weights, max_size=5), st.randoms())
def test_order_and_type_of_the_weights_do_not_matter(
    weights: dict[str, float], chance: object
) -> None:
    items = list(weights.items())
    chance.shuffle(items)  # type: ignore[attr-defined]
    one, other = Blend(weights), Blend(dict(items))
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other)
    assert list(one) == sorted(one)
    assert Blend(one) == one


@given(blends)
def test_print_and_parse_round_trip(blend: Blend) -> None:
    assert Blend.parse(str(blend)) == blend
    assert str(Blend.parse(str(blend))) == str(blend)


@given(st.dictionaries(st.sampled_from("abcde"), units, max_size=5))
def test_what_is_printed_is_the_weight_to_the_last_digit(weights: dict[str, int]) -> None:
    blend = Blend({name: u / 64 for name, u in weights.items()})
    printed = {} if not blend else dict(p.split("=") for p in blend.weights_text.split(","))
    assert {name: Fraction(text) for name, text in printed.items()} == {
        name: Fraction(u, 64) for name, u in weights.items() if u
    }


@given(blends, blends)
def test_different_blends_print_differently(one: Blend, other: Blend) -> None:
    assert (one == other) == (str(one) == str(other)) == (one.units == other.units)


def test_known_texts() -> None:
    assert str(Blend({"math": 0.25, "code": 0.75})) == "blend:code=0.75,math=0.25"
    assert Blend({"a": -0.25, "b": 1}).weights_text == "a=-0.25,b=1"
    assert Blend().weights_text == "none"
    assert str(Blend()) == "blend:none"
    assert Blend({"a": 1 + 1 / 64}).weights_text == "a=1.015625"
    for text in ("a=0.5,b=-2", "blend:a=0.5,b=-2", " b=-2 , a=0.50001 ", "blend: a=.5,b=-2.0"):
        assert Blend.parse(text) == Blend({"a": 0.5, "b": -2})
    for text in ("", "none", "blend:", "blend:none"):
        assert Blend.parse(text) == Blend()


def test_zero_entries_vanish() -> None:
    assert Blend({"a": 0.0, "b": 1.0, "c": -0.0, "d": 1 / 200}) == Blend({"b": 1.0})
    assert Blend.parse("a=0") == Blend()
    assert "a" not in Blend({"a": 0.001})
    with pytest.raises(KeyError):
        Blend({"a": 0.0})["a"]


def test_a_blend_is_an_immutable_mapping() -> None:
    weights = {"a": 1.0}
    blend = Blend(weights)
    weights["a"] = 2.0
    assert dict(blend) == {"a": 1.0}
    assert len(blend) == 1
    with pytest.raises(AttributeError):
        blend.units = ()  # type: ignore[misc]
    assert {blend: "hit"}[Blend({"a": 1.001})] == "hit"
    assert blend != {"a": 1.0}


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 8.001, -8.001, 1e300, 10**400])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(BlendError, match="'code'"):
        Blend({"math": 1.0, "code": weight})


@pytest.mark.parametrize("weight", [8, -8, 8.0])
def test_the_limits_themselves_are_allowed(weight: float) -> None:
    assert Blend({"a": weight})["a"] == weight


@pytest.mark.parametrize("name", ["", " ", "a b", "a=b", "a,b", "a\n", "\ta", "a\u2003b"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(BlendError, match="no module name"):
        Blend({name: 1.0})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a=1,a=0.5", "twice"),
        ("a=1, a=1", "twice"),
        ("a=0,a=1", "twice"),
        ("a", "no weight"),
        ("a=1,", "no weight"),
        (",", "no weight"),
        ("a=1;b=2", "no module name"),
        ("a=", "not a number"),
        ("a=one", "not a number"),
        ("a=nan", "out of range"),
        ("a=-inf", "out of range"),
        ("a=9", "out of range"),
        ("=1", "no module name"),
        ("a b=1", "no module name"),
        ("a=b=1", "no module name"),
    ],
)
def test_malformed_texts_are_refused(text: str, named: str) -> None:
    for form in (text, f"blend:{text}"):
        with pytest.raises(BlendError, match=named):
            Blend.parse(form)
    assert issubclass(BlendError, MergerouteError)
    assert issubclass(BlendError, ValueError)


@given(blends)
def test_renaming_keeps_the_weights(blend: Blend) -> None:
    there = {name: f"sha256:{k}" for k, name in enumerate(blend)}
    back = {new: old for old, new in there.items()}
    assert sorted(blend.renamed(there).values()) == sorted(blend.values())
    assert blend.renamed(there).renamed(back) == blend


def test_renaming_adds_up_what_meets_and_cancels_what_cancels() -> None:
    blend = Blend({"a": 0.5, "b": 0.25, "c": -0.75, "d": 1.0})
    assert blend.renamed({"a": "x", "b": "x", "c": "y", "d": "z"}) == Blend(
        {"x": 0.75, "y": -0.75, "z": 1.0}
    )
    assert blend.renamed(dict.fromkeys("abcd", "x")) == Blend({"x": 1.0})
    assert blend.renamed({"a": "x", "b": "x", "c": "x", "d": "d"}) == Blend({"d": 1.0})


@pytest.mark.parametrize(
    ("weights", "abstained"),
    [
        ({}, 1.0),
        ({"a": 1.0}, 0.0),
        ({"a": 0.25, "b": 0.25}, 0.5),
        ({"a": 2.0}, 0.0),
        ({"a": -1.0}, 1.0),
        ({"a": 0.75, "b": -0.25}, 0.5),
    ],
)
def test_abstained_is_what_is_missing_to_one(weights: dict[str, float], abstained: float) -> None:
    assert Blend(weights).abstained == abstained
