"""What a server tells of itself, beside its log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # OpenTelemetry is imported where it is asked for
    from .traces import Traces

Dialect = Literal["vllm"]


@dataclass(frozen=True)
class Telemetry:
    """What is told, and how.

    metrics_compat: whose names the metrics have too. traces: where spans go; None: nowhere.
    logs_prompts: whether the log's line of a request holds its prompts and completions.
    """

    metrics_compat: Dialect | None = None
    traces: Traces | None = None
    logs_prompts: bool = False


QUIET = Telemetry()
"""Our own metrics and log lines alone."""
