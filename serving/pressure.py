"""How long things may take."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Pressure(BaseModel):
    """What is waited for, and how long."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_waiting: int = Field(1024, ge=1, description="most requests that wait for a slot")
    request_timeout_seconds: float | None = Field(
        None, gt=0, description="time for a request, from its body to its last token; null: any"
    )
    stalled_reader_seconds: float = Field(
        60, gt=0, description="how long a client may take no byte of its answer"
    )
    drain_seconds: float = Field(
        25, ge=0, description="time for running requests to end after the server is told to stop"
    )
    watchdog_seconds: float = Field(
        120, gt=0, description="how long a step may take before the server is not ready"
    )


DEFAULT_PRESSURE = Pressure()
