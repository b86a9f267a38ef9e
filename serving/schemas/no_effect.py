"""Parameters that are accepted where they ask for nothing. All others are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "length_penalty": (1.0,),
    "priority": (0,),
    "is_3d_lora_weight": (False,),
    "annotations": ([],),
}
"""Parameters, of bodies and messages, that are not supported, with the values that ask for nothing
and so are accepted.
"""

_FREE = (
    "blend",
    "chat_template_kwargs",
    "guided_json",
    "headers",
    "logit_bias",
    "metadata",
    "response_format",
    "routing",
    "structured_outputs",
    "tools",
    "weights",
)
"""Objects whose keys are the caller's, and no parameters."""


def without_no_effect(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without nulls and without values that ask for nothing, at every depth."""
    return {
        key: value if key in _FREE else _cleaned(value)
        for key, value in body.items()
        if value is not None and not _asks_for_nothing(key, value)
    }


def _asks_for_nothing(key: str, value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return any(value == no and type(value) is type(no) for no in NO_EFFECT.get(key, ()))


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return without_no_effect(value)
    return [_cleaned(item) for item in value] if isinstance(value, list) else value
