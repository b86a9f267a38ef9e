"""Who gets which variant."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.access.callers import Caller
from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.allocation import allocate, ramped
from mergeroute.serving.experiments.enrolment import Enrolment, Running, enrol
from mergeroute.serving.experiments.layers import claim
from mergeroute.serving.experiments.units import Unit

from .shapes import KEYED, SECRET, experiment, facts, property_of, running

ADMIN = Caller("ops", frozenset(("inference", "admin")))
FORCE = "x-mergeroute-variant"
ATTACHED = running(experiment(attach_to="auto"))
USERS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def given_to(model: str, each: Running, **request: Any) -> Enrolment | None:
    """What one experiment decides."""
    return enrol([each], model, facts(**request), secret=SECRET)


def asked(each: Running, **request: Any) -> Enrolment:
    """What an experiment that is named decides."""
    found = given_to(each.experiment.name, each, **request)
    assert found is not None
    return found


@property_of
@given(user=USERS)
def test_the_same_key_gets_the_same_variant_however_it_is_asked(user: str) -> None:
    again = running(experiment(attach_to="auto"))
    by_name = asked(ATTACHED, user=user, request_id="r-1")
    assert by_name == asked(again, user=user, request_id="r-2", headers={"x-session-id": "s"})
    assert by_name == given_to("auto", again, user=user)
    assert by_name.unit == Unit("user", user).digest(SECRET)
    assert user not in by_name.unit or len(user) < 3


def test_an_enrolment_says_what_serves_and_why() -> None:
    found = asked(ATTACHED, user="1")
    target = {"control": "zoo-ties", "routed": "zoo"}[found.variant]
    assert found == Enrolment(
        "ties", 3, found.variant, target, found.unit, "user", reason="drawn by user"
    )


def test_weights_are_what_users_get() -> None:
    counts = Counter(asked(ATTACHED, user=str(n)).variant for n in range(4_000))
    assert abs(counts["control"] - 2_000) < 4 * 32


def test_those_who_do_not_take_part_get_the_control_or_go_on() -> None:
    tenth = running(experiment(attach_to="auto", traffic=0.1))
    named = [asked(tenth, user=str(n)) for n in range(2_000)]
    outside = [found for found in named if not found.is_exposed]
    assert abs(len(outside) - 1_800) < 4 * 14
    assert {(found.variant, found.unit) for found in outside} == {("control", "")}
    attached = [given_to("auto", tenth, user=str(n)) for n in range(2_000)]
    assert attached == [found if found.is_exposed else None for found in named]


@pytest.mark.parametrize("changed", [{"audience": {"keys": ["app"]}}, {"unit": ["user"]}])
def test_others_and_nobody_take_no_part(changed: dict[str, Any]) -> None:
    each = running(experiment(attach_to="auto", **changed))
    assert not asked(each).is_exposed
    assert given_to("auto", each) is None
    assert asked(each, user="u", caller=KEYED).is_exposed


@property_of
@given(user=USERS, less=st.integers(1, 9_999), more=st.integers(1, 9_999))
def test_traffic_that_grows_or_shrinks_reshuffles_nobody(user: str, less: int, more: int) -> None:
    first = claim([((100, 200),)], min(less, 9_900) / 10_000)
    second = claim([((100, 200),)], min(more, 9_900) / 10_000, held=first)
    before = given_to("auto", replace(ATTACHED, ranges=first), user=user)
    after = given_to("auto", replace(ATTACHED, ranges=second), user=user)
    if before and after:
        assert before == after
    elif more >= less:
        assert before is None
    else:
        assert after is None


@property_of
@given(user=USERS, percent=st.integers(1, 99))
def test_a_ramp_moves_users_one_way(user: str, percent: int) -> None:
    one = replace(ATTACHED, allocation=allocate({"control": 0.99, "routed": 0.01}))
    wanted = {"control": 1 - percent / 100, "routed": percent / 100}
    more = replace(one, allocation=ramped(one.allocation, wanted))
    if asked(one, user=user).variant == "routed":
        assert asked(more, user=user).variant == "routed"


def test_experiments_of_a_layer_share_no_user_and_all_are_asked() -> None:
    first = running(experiment(attach_to="auto", traffic=0.5))
    second = running(
        experiment(name="two", attach_to="auto", traffic=0.5),
        ranges=claim([first.ranges], 0.5),
    )
    got = [enrol([first, second], "auto", facts(user=str(n)), secret=SECRET) for n in range(200)]
    assert {found.experiment for found in got if found} == {"ties", "two"}
    assert None not in got
    assert got == [
        enrol([second, first], "auto", facts(user=str(n)), secret=SECRET) for n in range(200)
    ]


@pytest.mark.parametrize(
    ("state", "promoted", "variant"),
    [
        ("paused", None, "control"),
        ("concluded", None, "control"),
        ("concluded", "routed", "routed"),
    ],
)
def test_an_experiment_that_does_not_run_answers_and_records_nothing(
    state: Any, promoted: str | None, variant: str
) -> None:
    each = replace(ATTACHED, state=state, promoted=promoted)
    found = {(e.variant, e.is_exposed) for n in range(50) if (e := asked(each, user=str(n)))}
    assert found == {(variant, False)}
    assert given_to("auto", each, user="1") is None


def test_a_draft_says_how_to_start_it() -> None:
    with pytest.raises(ApiError, match="POST /v1/experiments/ties/start") as caught:
        asked(replace(ATTACHED, state="draft"))
    assert (caught.value.status, caught.value.code) == (409, "experiment_not_started")
    assert given_to("auto", replace(ATTACHED, state="draft")) is None


@pytest.mark.parametrize("model", ["zoo", "ties", "auto"])
def test_what_no_experiment_has_a_say_in(model: str) -> None:
    assert enrol([], model, facts(), secret=SECRET) is None
    plain = running(experiment(name="plain"))
    assert enrol([plain], model, facts(), secret=SECRET) is None


@pytest.mark.parametrize("state", ["draft", "running", "paused", "concluded"])
@pytest.mark.parametrize("model", ["ties", "auto"])
@pytest.mark.parametrize(("variant", "target"), [("control", "zoo-ties"), ("routed", "zoo")])
def test_an_administrator_forces_a_variant(
    state: Any, model: str, variant: str, target: str
) -> None:
    each = replace(ATTACHED, state=state, ranges=())
    found = given_to(model, each, headers={FORCE: f"ties={variant}"}, caller=ADMIN)
    assert found is not None
    assert (found.variant, found.target, found.is_forced) == (variant, target, True)


@pytest.mark.parametrize(
    ("forced", "model", "message"),
    [
        ("ties=new", "auto", "'ties=new' is no EXPERIMENT=VARIANT of this server"),
        ("other=routed", "auto", "there are: ties=control, ties=routed, for the models auto, ties"),
        ("routed", "ties", "is no EXPERIMENT=VARIANT"),
        ("", "zoo", "is no EXPERIMENT=VARIANT"),
        ("ties=routed", "zoo", "does not go with model 'zoo'"),
    ],
)
def test_what_cannot_be_forced(forced: str, model: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        given_to(model, ATTACHED, headers={FORCE: forced}, caller=ADMIN)
    assert (caught.value.status, caught.value.param) == (400, FORCE)


def test_forcing_takes_the_admin_scope_and_is_never_ignored() -> None:
    with pytest.raises(ApiError, match="needs the scope admin") as caught:
        given_to("auto", ATTACHED, headers={FORCE: "ties=routed"}, caller=KEYED)
    assert caught.value.status == 403
    with pytest.raises(ApiError, match="there are: none, for the models none"):
        enrol([], "auto", facts(headers={FORCE: "ties=routed"}), secret=SECRET)
