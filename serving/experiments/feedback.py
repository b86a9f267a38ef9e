"""What clients say of answers: checked against the experiment that the answer was a part of."""

from __future__ import annotations

import time
from typing import Any

from ..access.callers import Caller
from ..errors import ApiError
from .definition import Experiment
from .live import LiveExperiments
from .records import Exposure, Feedback
from .refusals import unknown_request
from .schemas import FeedbackRequest

IDEMPOTENCY_HEADER = "idempotency-key"
_MOST_KEY = 255
_DAY_S = 86_400


async def give(
    live: LiveExperiments, body: FeedbackRequest, caller: Caller, idempotency_key: str | None
) -> dict[str, Any]:
    """Keep feedback; what is answered is the same however often it is sent. It has been kept, for
    good, when this returns.

    Raises:
        ApiError: the answer is not known, another key's, or too old; the experiment has no such
            metric; the value is not of its kind; the key or the metric was used for another value.
    """
    if idempotency_key is not None and not 0 < len(idempotency_key) <= _MOST_KEY:
        raise ApiError(
            f"the header Idempotency-Key has {len(idempotency_key):,} characters, it may have 1 to "
            f"{_MOST_KEY}",
            param="Idempotency-Key",
        )
    exposure = await live.recorder.find(body.request_id)
    if exposure.caller != caller.name:  # as if it were not there: ids are told to their own key
        raise unknown_request(body.request_id)
    running = live.snapshot.by_name.get(exposure.experiment)
    if running is None or exposure.version < running.first_version:
        raise ApiError(
            f"the experiment {exposure.experiment!r} of this answer was deleted",
            status=410,
            param="request_id",
            code="experiment_deleted",
        )
    check(body, exposure, running.experiment)
    feedback = Feedback(
        body.request_id, body.metric, body.value, time.time(), caller.name, idempotency_key
    )
    if await live.recorder.feedback(feedback):
        live.feedback_counts[exposure.experiment, body.metric] += 1
    return {
        "object": "feedback",
        "request_id": body.request_id,
        "metric": body.metric,
        "value": body.value,
        "experiment": exposure.experiment,
        "variant": exposure.variant,
    }


def check(body: FeedbackRequest, exposure: Exposure, experiment: Experiment) -> None:
    """Refuse feedback that does not fit.

    Raises:
        ApiError: it comes too late, of a metric that is not declared, or is not of its kind.
    """
    age_days = (time.time() - exposure.at) / _DAY_S
    if age_days > experiment.feedback_days:
        raise ApiError(
            f"the answer is {age_days:.1f} days old, feedback is taken for "
            f"{experiment.feedback_days:g} (feedback_days)",
            status=410,
            param="request_id",
            code="feedback_too_late",
        )
    metric = {each.name: each for each in experiment.metrics}.get(body.metric)
    if metric is None:
        known = ", ".join(each.name for each in experiment.metrics) or "none"
        raise ApiError(
            f"the experiment {experiment.name!r} declares no metric {body.metric!r}; it declares: "
            f"{known}",
            param="metric",
            code="unknown_metric",
        )
    is_whole = body.value >= 0 and body.value.is_integer()
    rules = {
        "binary": (body.value in (0, 1), "0 or 1"),
        "count": (is_whole, "a whole number from 0"),
        "continuous": (True, ""),
    }
    fits, rule = rules[metric.kind]
    if not fits:
        raise ApiError(
            f"value is {body.value:g}, a {metric.kind} metric takes {rule}", param="value"
        )
