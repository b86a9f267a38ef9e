"""Hashing into buckets."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mergeroute.serving.experiments.hashing import BUCKETS, bucket

from .shapes import property_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@property_of
@given(salt=TEXTS, key=TEXTS)
def test_a_bucket_is_as_documented(salt: str, key: str) -> None:
    written = sha256(salt.encode() + b"\0" + key.encode()).hexdigest()
    assert bucket(salt, key) == int(written[:16], 16) % 10_000


@pytest.mark.parametrize(
    ("salt", "key", "found"), [("checkout", "42", 7366), ("", "", 3192), ("checkout", "José", 3081)]
)
def test_buckets_never_change(salt: str, key: str, found: int) -> None:
    assert bucket(salt, key) == found


def test_salt_and_key_are_kept_apart() -> None:
    assert bucket("ab", "c") != bucket("a", "bc")


@pytest.mark.parametrize("form", ["{}", "user-{}", "{:032x}", "{:08d}@example.org"])
def test_buckets_are_equally_likely(form: str) -> None:
    counts = Counter(bucket("salt", form.format(n)) // 100 for n in range(50_000))
    assert chisquare([counts[hundred] for hundred in range(BUCKETS // 100)]).pvalue > 0.001
