"""Bodies of which only a part is ours to understand: the rest is for the engine that they go to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request
from pydantic import Field

from ...adapters.errors import RequestError
from ...runtime.types import SamplingParams
from ..access.checks import check_messages
from ..access.limits import Limits
from ..chat import Prompt, chat_prompt, text_prompt
from ..errors import ApiError
from ..schemas.completions import ChatRequest, CompletionRequest, GenerationBody
from ..schemas.no_effect import without_no_effect
from ..validation import read_as, refuse_unknown, validate

if TYPE_CHECKING:
    from ..service import Service

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"

_OURS = frozenset(
    (
        "model",
        "blend",
        "routing",
        "conversation",
        "reroute",
        "adapter_id",
        "adapter_source",
        "merged_adapters",
        "adapter",
        "lora",
    )
)
"""Fields that say what is to answer, and are not passed on."""

_LABELS = frozenset(("metadata", "user", "safety_identifier", "prompt_cache_key"))
"""Fields that change no answer: an engine that does not know them goes without."""

_READ = frozenset(
    (
        *("n", "stop", "max_tokens", "max_completion_tokens", "prompt", "stream"),
        *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    )
)
"""Fields that we look at too, beside messages and stream_options, in which there may be more."""

_REFUSED = {
    "kv_transfer_params": "they reach into other servers' memory",
    "ec_transfer_params": "they reach into other servers' memory",
    "stream_interval": "a stream that is given up is charged by its chunks",
    "prompt_embeds": "a router has nothing to read in them: send a prompt",
}
_EXTRA = "vllm_xargs"
"""Arguments without a field of their own; vLLM takes those that are refused from here as well."""

_ROUTED_ROLES = frozenset(("system", "developer", "user", "assistant"))


class RelayedChat(ChatRequest):
    """What is read of a chat's body. document: all of it."""

    document: dict[str, Any] = Field(default_factory=dict)

    def sampling(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """The length alone."""
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return _length(limit)


class RelayedText(CompletionRequest):
    """What is read of a text completion's body. document: all of it."""

    document: dict[str, Any] = Field(default_factory=dict)

    def sampling(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """The length alone."""
        return _length(self.max_tokens)


RelayedBody = RelayedChat | RelayedText


async def read_relayed(request: Request, service: Service) -> GenerationBody:
    """A body for an engine that takes it as it is.

    Raises:
        ApiError: what we read of it is at fault, or neither we nor the engine know a field.
    """
    limits: Limits = request.state.limits

    def understood(document: dict[str, Any]) -> GenerationBody:
        check_messages(document.get("messages"), limits)
        is_chat = _is_chat(request.url.path, document)
        _refuse(document, service, CHAT_PATH if is_chat else TEXT_PATH)
        _check_numbers(document)
        return relayed(document, is_chat=is_chat)

    return await read_as(request, understood)


def relayed(document: dict[str, Any], *, is_chat: bool) -> RelayedBody:
    """A body with what we read of it.

    Raises:
        ApiError: that is at fault.
    """
    kind: type[RelayedBody] = RelayedChat if is_chat else RelayedText
    read = {name: value for name, value in document.items() if name in _OURS | _LABELS | _READ}
    if is_chat:
        read["messages"] = _readable(document.get("messages"))
    if isinstance(options := document.get("stream_options"), dict):
        read["stream_options"] = {"include_usage": options.get("include_usage", False)}
    body = validate(read, kind)
    return body.model_copy(update={"document": document})


def passed_on(body: RelayedBody) -> dict[str, Any]:
    """What of a body goes to the engine, but for the model. Streams always tell their usage."""
    passed = {name: value for name, value in body.document.items() if name not in _OURS}
    if body.stream:
        passed["stream_options"] = {**(passed.get("stream_options") or {}), "include_usage": True}
    return passed


def relayed_prompt(body: RelayedChat, tokenizer: Any) -> Prompt:  # noqa: ANN401
    """A chat's prompt as the router sees it, and about as the engine will: without tools. Where the
    chat template refuses the rest, the engine will say so.

    Raises:
        ApiError: the caller's own arguments for the template are at fault.
    """
    try:
        return chat_prompt(tokenizer, body.messages, body.template_arguments)
    except ApiError as error:
        if error.param != "messages":
            raise
        text = "\n".join(message.text for message in body.messages)
        return text_prompt(tokenizer, text or " ")


def _is_chat(path: str, document: Mapping[str, Any]) -> bool:
    if path in (CHAT_PATH, TEXT_PATH):
        return path == CHAT_PATH
    return "messages" in document


def _length(limit: int | None) -> SamplingParams:
    if limit == 0:
        return SamplingParams(max_tokens=0, prompt_logprobs=0)
    if limit is not None and limit < 0:
        raise RequestError(f"max_tokens is {limit}, allowed is at least 1", parameter="max_tokens")
    return SamplingParams(max_tokens=limit)


def _refuse(document: Mapping[str, Any], service: Service, path: str) -> None:
    extra = document.get(_EXTRA)
    extras = {f"{_EXTRA}.{key}": extra[key] for key in extra} if isinstance(extra, dict) else {}
    for name, value in {**document, **extras}.items():
        reason = _REFUSED.get(name.removeprefix(f"{_EXTRA}."))
        if reason and value is not None:
            raise ApiError(
                f"the parameter {name!r} is not passed on: {reason}",
                param=name,
                code="unsupported_parameter",
            )
    known = [h.upstream.fields(path) for h in service.hosted if h.upstream]
    if told := [fields for fields in known if fields]:
        asked = without_no_effect(document).keys()
        refuse_unknown(asked - _OURS - _LABELS - frozenset.union(*told))


def _check_numbers(document: Mapping[str, Any]) -> None:
    """Refuse what Python reads and JSON does not hold, at any depth: it cannot be passed on."""
    try:
        json.dumps(document, allow_nan=False)
    except ValueError as error:
        raise ApiError("the body holds NaN or Infinity, which is no JSON: send a number") from error


def _readable(messages: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Messages as the router reads them: their text. What a tool said, it does not look at."""
    if not isinstance(messages, list):
        return messages
    is_object = all(isinstance(message, dict) for message in messages)
    if not is_object:
        return messages
    said = [m for m in messages if m.get("role") in _ROUTED_ROLES or "role" not in m]
    return [_text_alone(m) for m in said] or [{"role": "user", "content": ""}] * bool(messages)


def _text_alone(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    read = {name: message[name] for name in ("role", "name") if message.get(name) is not None}
    return {**read, "content": "" if content is None else content}
