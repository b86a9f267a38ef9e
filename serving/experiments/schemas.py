"""The bodies that change experiments and tell how answers did; an experiment's own is its
definition.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from ...adapters.errors import RequestError
from ..schemas.body import Body

_WHY = Field("", max_length=1000, pattern=r"^[^\x00]*$", description="kept with the change")
_REQUEST_ID = r"^[\x21-\x7e]{1,128}$"


class ChangeRequest(Body):
    """`POST /v1/experiments/{name}/start`, `pause`, `conclude` and `rollback`; may be left out."""

    reason: str = _WHY


class PromoteRequest(ChangeRequest):
    """`POST /v1/experiments/{name}/promote`."""

    variant: str = Field(description="whose target answers `auto` from now on")


class RampRequest(ChangeRequest):
    """`PATCH /v1/experiments/{name}`. What is left out stays as it is."""

    weights: dict[str, float] | None = Field(
        None, max_length=100, description="of every variant; they sum to 1"
    )
    traffic: float | None = Field(None, description="share of the layer, from 0 to 1")

    @model_validator(mode="after")
    def _changes_something(self) -> RampRequest:
        if self.weights is None and self.traffic is None:
            raise RequestError("nothing is to change: give weights, or traffic, or both")
        return self


class FeedbackRequest(Body):
    """`POST /v1/feedback`."""

    request_id: str = Field(
        pattern=_REQUEST_ID, description="x-request-id of the answer that is judged"
    )
    metric: str = Field(min_length=1, max_length=64, description="one that the experiment declares")
    value: float = Field(allow_inf_nan=False, description="binary: 0 or 1; count: 0, 1, 2, ...")


class ReplayRequest(Body):
    """`POST /v1/replay`."""

    request_id: str = Field(
        pattern=_REQUEST_ID, description="x-request-id of the answer that is asked for"
    )
