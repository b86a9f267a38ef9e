"""Whether a body asks for no more than the limits allow."""

from __future__ import annotations

from ..errors import ApiError
from ..modules.schemas import LoadModuleRequest
from ..schemas.completions import ChatRequest, GenerationBody
from .limits import Limits


def check_generation(body: GenerationBody, limits: Limits) -> None:
    """Refuse what asks for too much, before it is tokenized.

    Raises:
        ApiError: it names the parameter, what it holds and what it may.
    """
    if isinstance(body, ChatRequest):
        name, count = "messages", 1
        sizes = [sum(len(message.text) for message in body.messages)]
        check_messages(body.messages, limits)
    else:
        name, count = "prompt", len(body.prompts)
        sizes = [len(prompt) for prompt in body.prompts]
    most = limits.prompt_characters
    _check(count, limits.prompts, name, what="prompts", setting="prompts")
    _check(count * body.n, limits.choices, "n", what="choices", setting="choices")
    _check(len(body.stop), limits.stops, "stop", what="stop texts", setting="stops")
    _check(max(sizes), most, name, what="characters", setting="prompt_characters")


def check_messages(messages: object, limits: Limits) -> None:
    """Refuse too many messages, before they are looked at: each is compared with every shape.

    Raises:
        ApiError: it says how many they are.
    """
    if isinstance(messages, (list, tuple)):
        most = limits.messages
        _check(len(messages), most, "messages", what="messages", setting="messages")


def check_text(name: str, longest: int, limits: Limits) -> None:
    """Refuse a text that would take too long to tokenize. longest: in characters.

    Raises:
        ApiError: it says how long it is.
    """
    _check(longest, limits.prompt_characters, name, what="characters", setting="prompt_characters")


def check_load(body: LoadModuleRequest, limits: Limits) -> None:
    """Refuse a module that is introduced by too much.

    Raises:
        ApiError: it names the parameter, what it holds and what it may.
    """
    _check(len(body.samples), limits.samples, "samples", what="prompts", setting="samples")
    longest = max(map(len, body.samples), default=0)
    most = limits.prompt_characters
    _check(longest, most, "samples", what="characters", setting="prompt_characters")


def _check(found: int, most: int, parameter: str, *, what: str, setting: str) -> None:
    if found > most:
        raise ApiError(
            f"{parameter} comes to {found:,} {what}, the limit is {most:,} (limits.{setting}): ask "
            "for less at a time",
            param=parameter,
            code="context_length_exceeded" if setting == "prompt_characters" else None,
        )
