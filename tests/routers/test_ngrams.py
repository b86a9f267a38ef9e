"""Hashed n-grams against a slow count, and what does not count."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Query, Turn
from mergeroute.routers.ngrams import Ngrams

texts = st.text(max_size=50)


def vector(text: str, size: int = 64) -> torch.Tensor:
    return Ngrams(size).read([Query.of(text=text)])[0]


@pytest.mark.parametrize(
    ("text", "data"), [("Ab7", b" ab0 "), ("ß€", b" \xc3\x9f\xe2\x82\xac "), ("", b"  ")]
)
def test_counts_are_signed_hashes_of_every_run_of_two_or_three_bytes(
    text: str, data: bytes
) -> None:
    expected = torch.zeros(64)
    for length in (2, 3):
        for start in range(len(data) - length + 1):
            code = zlib.crc32(data[start : start + length])
            expected[code % 64] += 1 if code >> 16 & 1 else -1
    assert torch.allclose(vector(text), expected / expected.norm())


@given(text=texts)
def test_a_vector_has_length_one_and_is_the_same_every_time(text: str) -> None:
    found = vector(text)
    assert found.shape == (64,)
    assert found.norm() == pytest.approx(1.0, abs=1e-5) or not found.any()
    assert torch.equal(found, vector(text))


@given(text=st.text(alphabet="abcXYZ äß?", max_size=30), digits=st.integers(100, 999))
def test_letter_case_and_values_of_digits_do_not_count(text: str, digits: int) -> None:
    assert torch.equal(vector(f"{text} {digits}"), vector(f"{text} 555"))
    assert torch.equal(vector("WRITE This"), vector("write this"))


def test_only_the_last_turn_is_read() -> None:
    turns = (Turn(text="first"), Turn(text="last"))
    assert torch.equal(Ngrams(64).read([Query(turns)])[0], vector("last"))


def test_of_a_huge_text_both_ends_count() -> None:
    huge = "begin " + "x" * 1_000_000 + " end"
    assert not torch.equal(vector(huge), vector("other " + huge[6:]))
    assert not torch.equal(vector(huge), vector(huge[:-4] + " eve"))


def test_lone_surrogates_are_text_too() -> None:
    assert vector("\ud800 a").isfinite().all()


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(RouterError, match="ngrams 0 is out of range"):
        Ngrams(0)
