"""What is known before the database has it."""

from __future__ import annotations

from mergeroute.serving.experiments.records import Record
from mergeroute.serving.experiments.undrained import Undrained

from .recorded import exposure, feedback, outcome


def test_the_first_of_each_is_known() -> None:
    known = Undrained([exposure("a"), outcome("a"), exposure("a", variant="routed")])
    known.add(feedback("a", 1.0, idempotency_key="k"))
    known.add(feedback("a", 2.0))
    assert known.exposure("a") == exposure("a")
    assert known.exposure("b") is None
    first = feedback("a", 1.0, idempotency_key="k")
    assert known.feedback(feedback("a", 3.0)) == first
    assert known.feedback(feedback("b", idempotency_key="k")) == first
    assert known.feedback(feedback("b", idempotency_key="k", caller="other")) is None


def test_what_was_stored_is_known_for_a_while() -> None:
    records: list[Record] = [exposure("a"), feedback("a", idempotency_key="k")]
    for kept_s, is_known in ((5.0, True), (0.0, False)):
        known = Undrained(records, kept_s=kept_s)
        known.stored(records)
        assert (known.exposure("a") is not None) is is_known
        assert (known.feedback(feedback("a")) is not None) is is_known
        assert (known.feedback(feedback("b", idempotency_key="k")) is not None) is is_known
