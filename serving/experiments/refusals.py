"""What those are told who give feedback that is not taken."""

from __future__ import annotations

from ..errors import ApiError
from .records import Feedback


def unknown_request(request_id: str) -> ApiError:
    """No answer of this id, as far as the caller may know: another key's is told of alike."""
    return ApiError(
        f"no answer with the request id {request_id!r} takes part in an experiment: send the "
        "x-request-id of one whose headers name an experiment",
        status=404,
        param="request_id",
        code="request_not_found",
    )


def check_same(earlier: Feedback, feedback: Feedback) -> None:
    """Refuse another one under the same key, or another value of the same.

    Raises:
        ApiError: it is one (409).
    """
    is_same = (earlier.request_id, earlier.metric, earlier.value) == (
        feedback.request_id,
        feedback.metric,
        feedback.value,
    )
    if is_same:
        return
    is_keyed = (earlier.caller, earlier.idempotency_key) == (
        feedback.caller,
        feedback.idempotency_key or "",
    )
    if is_keyed:
        raise ApiError(
            "the Idempotency-Key was used for other feedback: use a new one for each",
            status=409,
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    raise ApiError(
        f"{feedback.metric} of this request is {earlier.value:g} already: feedback is not changed",
        status=409,
        param="value",
        code="feedback_exists",
    )
