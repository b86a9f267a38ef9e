"""An experiment as people write it: the body of POST /v1/experiments, an entry of serve.yaml."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ..errors import ApiError
from .allocation import least_buckets, shares, whole_buckets
from .audience import Audience, Section, header_name
from .hashing import BUCKETS
from .metrics import BUILT_IN, Guardrail, Label, MetricSettings

__all__ = ["Audience", "Bandit", "Experiment", "Guardrail", "MetricSettings", "ShadowSettings"]

ASSIGNMENT_HEADER = "x-mergeroute-assignment-key"
HEADER_UNIT = "header:"
MAX_VARIANTS = 20
DEFAULT_STORE_DAYS = 7.0
_UNITS = ("user", "session", "api_key", "request")
_Salt = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
"""Neither a colon, so that no experiment is hashed like a layer, nor a zero byte."""


class Variant(Section):
    """One of the things that are compared."""

    name: Label = Field(description="as the answer's header x-mergeroute-variant states it")
    target: str = Field(
        min_length=1, max_length=2048, description="what answers: anything that `model` may name"
    )
    weight: float = Field(description="share of the units, a multiple of 1/10,000")
    control: bool = Field(False, description="whether the others are compared with it")


class Bandit(Section):
    """Weights follow what the variants achieve."""

    metric: str = Field(description="what is to be gained")
    floor: float = Field(0.05, ge=0, description="least weight of a variant, also at the start")
    every_minutes: float = Field(60, gt=0, description="least time between two changes of weights")


class ShadowSettings(Section):
    """A share of requests is answered once more by another variant, which nobody waits for."""

    variant: str = Field(description="which variant answers once more")
    share: float = Field(gt=0, le=1, description="of the requests of other variants")
    scorer: str | None = Field(
        None, description="what scores both answers: an entry point's name, or an http(s) URL"
    )


class Experiment(Section):
    """What is compared, for whom, and by what."""

    name: str = Field(description="what `model` may name to take part")
    salt: _Salt | None = Field(
        None, description="what keys are hashed with; null: a random one, made once and stored"
    )
    traffic: float = Field(1.0, gt=0, description="share of the layer's units that take part")
    attach_to: Literal["auto"] | None = Field(
        None, description="auto: requests for it take part, too"
    )
    layer: Label = Field(
        "default", description="experiments of one layer share no unit; layers are independent"
    )
    audience: Audience = Field(Audience(), description="who takes part, beside traffic")
    unit: tuple[str, ...] = Field(
        (HEADER_UNIT + ASSIGNMENT_HEADER, *_UNITS),
        min_length=1,
        max_length=8,
        description="what is assigned: the first of these that a request has",
    )
    variants: tuple[Variant, ...] = Field(
        min_length=2, max_length=MAX_VARIANTS, description="what is compared; one is the control"
    )
    metrics: tuple[MetricSettings, ...] = Field(
        (), max_length=100, description="what feedback may give"
    )
    guardrails: tuple[Guardrail, ...] = Field(
        (), max_length=100, description="what pauses the experiment"
    )
    bandit: Bandit | None = Field(None, description="what moves the weights; null: nobody but you")
    shadow: ShadowSettings | None = Field(None, description="what is answered once more")
    feedback_days: float = Field(7, gt=0, le=365, description="how long feedback is accepted")
    store_requests: bool = Field(
        False, description="keep requests and answers, in full, for replay"
    )
    store_days: float = Field(
        DEFAULT_STORE_DAYS, gt=0, le=365, description="how long these are kept"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="rate of false alarms that is accepted")

    @field_validator("name")
    @classmethod
    def _can_be_named(cls, name: str) -> str:
        from ...adapters.manifest import check_name  # imports torch, which --help need not

        return check_name(name)

    @field_validator("traffic")
    @classmethod
    def _in_buckets(cls, traffic: float) -> float:
        whole_buckets("traffic", traffic)
        return traffic

    @field_validator("unit")
    @classmethod
    def _is_a_chain(cls, chain: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(map(_unit, chain))
        _check_unique("the unit", found)
        if "request" in found[:-1]:
            raise ValueError("every request has the unit 'request': put it last, or leave it out")
        return found

    @field_validator("variants")
    @classmethod
    def _compare(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        _check_unique("the variant", (variant.name for variant in variants))
        shares({variant.name: variant.weight for variant in variants})
        if (count := sum(variant.control for variant in variants)) != 1:
            raise ValueError(f"{count} variants are the control: mark one with control: true")
        return variants

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Experiment:
        _check_unique("the metric", (*BUILT_IN, *(metric.name for metric in self.metrics)))
        _check_unique("the guardrail on", (guardrail.metric for guardrail in self.guardrails))
        asked = [guardrail.metric for guardrail in self.guardrails]
        for name in [*asked, *([self.bandit.metric] if self.bandit else [])]:
            if name not in self.measured:
                known = ", ".join(self.measured)
                raise ValueError(
                    f"no metric {name!r}: declare it in metrics, or take one of {known}"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Experiment:
        _check_floor(self.bandit, self.weights)
        if self.shadow and self.shadow.variant not in self.weights:
            raise ValueError(f"shadow.variant {self.shadow.variant!r} is no variant")
        return self

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """By variant, in the order of the variants."""
        return {variant.name: variant.weight for variant in self.variants}

    @cached_property
    def by_name(self) -> Mapping[str, Variant]:
        """The variants."""
        return {variant.name: variant for variant in self.variants}

    @cached_property
    def control(self) -> Variant:
        """What the others are compared with."""
        return next(variant for variant in self.variants if variant.control)

    @cached_property
    def measured(self) -> Mapping[str, MetricSettings]:
        """All metrics by name, those that are always recorded first."""
        return {**BUILT_IN, **{metric.name: metric for metric in self.metrics}}

    def salted(self, salt: str | None = None) -> Experiment:
        """With a salt, where it has none: this one, or a random one.

        Called once, when the experiment is created, so that the stored document has it and every
        restart and replica hashes alike. An update passes the salt of what is stored.
        """
        if self.salt is not None:
            return self
        return self._with("salt", salt or secrets.token_hex(8))

    def with_weights(self, weights: Mapping[str, float]) -> Experiment:
        """With other weights, of all variants.

        Raises:
            ApiError: one is missing or unknown, they are no shares that sum to 1, or one is below
                the bandit's floor.
        """
        if weights.keys() != self.weights.keys():
            raise ApiError(
                f"the weights are of {', '.join(weights) or 'nothing'}; state those of all "
                f"variants: {', '.join(self.weights)}",
                param="weights",
            )
        try:
            shares(weights)
            _check_floor(self.bandit, weights)
        except ValueError as error:
            raise ApiError(str(error), param="weights") from error
        variants = [{**v.model_dump(), "weight": weights[v.name]} for v in self.variants]
        return self._with("variants", variants)

    def _with(self, name: str, value: object) -> Experiment:
        """Validated again, which `model_copy` is not."""
        return type(self).model_validate({**self.model_dump(), name: value})


def _unit(name: str) -> str:
    """One link of the chain, checked; a header's name in lower case."""
    if name.startswith(HEADER_UNIT):
        return HEADER_UNIT + header_name(name.removeprefix(HEADER_UNIT))
    if name not in _UNITS:
        raise ValueError(f"{name!r} is no unit: header:NAME, {', '.join(_UNITS)}")
    return name


def _check_floor(bandit: Bandit | None, weights: Mapping[str, float]) -> None:
    """Refuse what a bandit could never mend: it moves no weight before it knows of all variants."""
    floor = bandit.floor if bandit else 0.0
    least = least_buckets(floor)
    if least * len(weights) > BUCKETS:
        raise ValueError(
            f"bandit.floor {floor:g} of {len(weights)} variants is more than there is: at most "
            f"{BUCKETS // len(weights) / BUCKETS:g}"
        )
    if low := [name for name, count in shares(weights).items() if count < least]:
        raise ValueError(
            f"the weight of {low[0]!r} is {weights[low[0]]:g}, below bandit.floor {floor:g}: raise "
            "it, or lower the floor"
        )


def _check_unique(what: str, names: Iterable[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{what} {twice[0]!r} is there twice: rename or remove one")
