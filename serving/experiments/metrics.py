"""What is measured: the metrics that every experiment records, and those it declares."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from .audience import Section

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Name of a variant, a metric or a layer."""

Kind = Literal["binary", "continuous", "count"]
Direction = Literal["up", "down"]


class MetricSettings(Section):
    """A metric that feedback gives."""

    name: Label = Field(description="as POST /v1/feedback names it")
    kind: Kind = Field(description="binary: 0 or 1; count: whole, from 0; continuous: any number")
    direction: Direction = Field(description="which way is better")


class Guardrail(Section):
    """A metric that pauses the experiment when a variant does worse than the control by more."""

    metric: str = Field(description="a declared metric, or one that is always recorded")
    max_increase: float | None = Field(
        None, ge=0, description="how far it may be above the control's, in the metric's unit"
    )
    max_decrease: float | None = Field(
        None, ge=0, description="how far it may be below the control's; one of the two is stated"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Guardrail:
        if (self.max_increase is None) == (self.max_decrease is None):
            raise ValueError(
                f"the guardrail on {self.metric!r} needs max_increase or max_decrease, one of them"
            )
        return self


BUILT_IN: Mapping[str, MetricSettings] = MappingProxyType(
    {
        name: MetricSettings(name=name, kind=kind, direction="down")
        for name, kind in (
            ("latency_ms", "continuous"),
            ("first_token_ms", "continuous"),
            ("completion_tokens", "count"),
            ("prompt_tokens", "count"),
            ("error", "binary"),
            ("abstained", "continuous"),
            ("truncated", "binary"),
        )
    }
)
"""What is always recorded. truncated: the answer ended at its length; abstained: weight that the
blend left to the backbone. That less is better is the default view of what costs.
"""
