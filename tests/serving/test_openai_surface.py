"""The rest of the `openai` client's chat surface: helpers, sampling, async, retries, errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service

from ..tiny import make_tokenizer
from .access.conftest import Guarded, guarded  # noqa: F401 - a fixture
from .conftest import Served, running, torch_engine
from .test_openai_client import PROMPT, ask, expected_text

MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
COUNT = 12
LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": MESSAGES,
    "max_tokens": 200,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


def options(**more: Any) -> dict[str, Any]:
    return {
        "model": "upper",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": COUNT,
        **more,
    }


def greedy(served: Served) -> str:
    return expected_text(served, Blend({"upper": 1}))


def token_of(letter: str) -> str:
    (token,) = make_tokenizer()(letter)["input_ids"]
    return str(token)


def content_of(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


# Helpers.


def test_the_stream_helper_tells_of_content_and_its_end(served: Served) -> None:
    chat: Any = served.client().chat.completions
    asked = options(logprobs=True, stream_options={"include_usage": True})
    with chat.stream(**asked) as stream:
        events = list(stream)
        final = stream.current_completion_snapshot
        with pytest.raises(openai.LengthFinishReasonError):  # it was cut
            stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == content_of(final) == greedy(served)
    assert [event.content for event in events if event.type == "content.done"] == ["".join(deltas)]
    told = [
        entry
        for event in events
        if event.type == "logprobs.content.delta"
        for entry in event.content
    ]
    assert len(told) == COUNT
    assert final.usage.completion_tokens == COUNT
    assert final.choices[0].finish_reason == "length"


def test_the_answers_id_and_headers_are_at_hand(served: Served) -> None:
    client: Any = served.client()
    answer = client.chat.completions.create(
        **options(extra_headers={"x-request-id": "mine-1"}, extra_query={"trace": "1"})
    )
    assert answer._request_id == "mine-1"
    streaming = client.chat.completions.with_streaming_response
    with streaming.create(**options(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.request_id
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_legacy_completions_have_raw_answers_too(served: Served) -> None:
    raw: Any = served.client().completions.with_raw_response
    response = raw.create(model="upper", prompt=PROMPT, max_tokens=3, temperature=0, echo=True)
    assert response.headers["x-mergeroute-blend"] == "upper=1"
    assert response.parse().choices[0].text.startswith(PROMPT)


# Sampling.


def test_streams_of_several_choices_are_those_of_the_whole_answer(served: Served) -> None:
    chat: Any = served.client().chat.completions
    asked = options(n=3, seed=11, temperature=1.2, top_p=0.95, logprobs=True, top_logprobs=2)
    whole = chat.create(**asked)
    texts, logprobs = [""] * 3, [[] for _ in range(3)]  # type: list[str], list[list[float]]
    for chunk in chat.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        entries = choice.logprobs.content if choice.logprobs else []
        logprobs[choice.index] += [entry.logprob for entry in entries]
    assert texts == [choice.message.content for choice in whole.choices]
    for told, choice in zip(logprobs, whole.choices, strict=True):
        assert told == pytest.approx([e.logprob for e in choice.logprobs.content], abs=1e-4)


def test_a_seed_makes_it_the_same_and_another_seed_another(served: Served) -> None:
    first, again, other = (
        content_of(ask(served.client(), model="upper", temperature=1.5, seed=seed))
        for seed in (3, 3, 4)
    )
    assert first == again != other


def test_a_bias_forces_a_token_or_bans_it(served: Served) -> None:
    chat: Any = served.client().chat.completions
    forced = chat.create(**options(logit_bias={token_of("z"): 100}, max_tokens=4))
    assert content_of(forced) == "zzzz"
    letter = next(letter for letter in greedy(served) if letter.isascii())
    banned = chat.create(**options(logit_bias={token_of(letter): -100}))
    assert letter not in content_of(banned)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_the_answer_before_them(served: Served, as_list: bool, stream: bool) -> None:
    chat: Any = served.client().chat.completions
    whole = greedy(served)
    stop = whole[3:5]
    asked = options(stop=["nowhere", stop] if as_list else stop, stream=stream)
    answer = chat.create(**asked)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        text, reason = content_of(answer), answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_max_completion_tokens_is_the_newer_name(served: Served) -> None:
    chat: Any = served.client().chat.completions
    named = {key: value for key, value in options().items() if key != "max_tokens"}
    answer = chat.create(**named, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert content_of(answer) == greedy(served)[: len(content_of(answer))]
    with pytest.raises(openai.BadRequestError) as caught:
        chat.create(**options(), max_completion_tokens=5)
    assert caught.value.param == "max_tokens"


def test_what_the_client_may_say_and_changes_nothing(served: Served) -> None:
    chat: Any = served.client().chat.completions
    said = {
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "metadata": {"tier": "gold"},
        "service_tier": "auto",
        "store": False,
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "top_p": 1,
        "n": 1,
    }
    answer = chat.create(**options(**said))
    assert content_of(answer) == greedy(served)
    assert answer.service_tier == "default"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("store", True),
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("modalities", ["text", "audio"]),
        ("service_tier", "priority"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(served: Served, name: str, value: Any) -> None:
    chat: Any = served.client().chat.completions
    with pytest.raises(openai.BadRequestError) as caught:
        chat.create(**options(**{name: value}))
    assert caught.value.param == name
    assert caught.value.code == "unsupported_parameter"


def test_apis_that_are_not_here_are_not_found(served: Served) -> None:
    client: Any = served.client()
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="auto", input="x")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve("chatcmpl-1")


# Async.


def test_the_async_client_streams_lists_and_embeds(served: Served) -> None:
    async def run() -> tuple[str, list[str], int]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            chat: Any = client.chat.completions
            text = ""
            async for chunk in await chat.create(**options(stream=True)):
                text += chunk.choices[0].delta.content or ""
            names = [model.id async for model in client.models.list()]
            found = await client.embeddings.create(model="tiny", input=["a", "b"])
            return text, names, len(found.data)

    text, names, count = asyncio.run(run())
    assert text == greedy(served)
    assert "auto" in names
    assert count == 2


# A server with one slot and one place to wait.


@pytest.fixture(scope="module")
def narrow(bank: Bank) -> Iterator[Served]:
    limits = EngineOptions(max_concurrency=1, max_waiting=1)
    service = Service(host_banks([bank], Placement(dtype="float32", options=limits)))
    handle = torch_engine(service).model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with (
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(url, service, bank, client)
    handle.remove()


def engine_of(served: Served) -> TorchEngine:
    return torch_engine(served.service)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_idle(served: Served) -> bool:
    stats = engine_of(served).stats()
    return stats.running == stats.waiting == 0


class crowded:
    """The slot and the place to wait are taken for the length of a block, or until `leave`."""

    def __init__(self, served: Served) -> None:
        self._served = served
        chat: Any = served.client().chat.completions
        self._streams = [chat.create(**LONG, stream=True)]
        wait_until(lambda: engine_of(served).stats().running == 1)
        self._streams.append(chat.create(**LONG, stream=True))
        wait_until(lambda: engine_of(served).stats().waiting == 1)

    def __enter__(self) -> crowded:
        return self

    def leave(self) -> None:
        for stream in self._streams:
            stream.close()

    def __exit__(self, *_: object) -> None:
        self.leave()
        wait_until(lambda: is_idle(self._served))


def counting(served: Served, *, retries: int) -> tuple[openai.OpenAI, list[float]]:
    """A client that tries again, and when it asked."""
    asked: list[float] = []
    http = openai.DefaultHttpxClient(
        event_hooks={"request": [lambda _: asked.append(time.monotonic())]}
    )
    client = openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=retries, http_client=http
    )
    return client, asked


def test_a_full_queue_is_a_rate_limit_error_and_tells_when_to_come_again(narrow: Served) -> None:
    with crowded(narrow), pytest.raises(openai.RateLimitError) as caught:
        ask(narrow.client())
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_the_client_tries_again_when_it_is_told_to(narrow: Served) -> None:
    client, asked = counting(narrow, retries=2)
    with client, crowded(narrow) as crowd:
        leaving = threading.Timer(0.3, crowd.leave)
        leaving.start()
        answer = ask(client, model="upper", max_tokens=3)
        leaving.join()
    assert content_of(answer) == greedy(narrow)[:3]
    assert len(asked) >= 2
    assert asked[1] - asked[0] >= 0.9  # Retry-After: 1


def test_a_draining_server_is_503_and_the_client_tries_again(narrow: Served) -> None:
    narrow.service.drain()
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(narrow.client())
        assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
        told = int(caught.value.response.headers["retry-after"])
        client, asked = counting(narrow, retries=1)
        back = threading.Timer(0.5, lambda: setattr(narrow.service, "is_draining", False))
        back.start()
        with client:
            ask(client, max_tokens=1)
        back.join()
    finally:
        narrow.service.is_draining = False
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 0.9 * told


def test_a_timeout_of_the_client_frees_its_slot(narrow: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        narrow.client().with_options(timeout=0.3).chat.completions.create(**LONG)
    wait_until(lambda: is_idle(narrow))


def test_a_stream_that_is_closed_frees_its_slot(narrow: Served) -> None:
    before = engine_of(narrow).stats().generated_tokens
    chat: Any = narrow.client().chat.completions
    with chat.create(**LONG, stream=True) as stream:
        for _, chunk in zip(range(4), stream, strict=False):
            assert chunk.choices
    wait_until(lambda: is_idle(narrow))
    assert engine_of(narrow).stats().generated_tokens - before < LONG["max_tokens"]


def test_a_cancelled_task_frees_its_slot(narrow: Served) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{narrow.url}/v1", api_key="none") as client:
            chat: Any = client.chat.completions
            task = asyncio.create_task(chat.create(**LONG))
            while not engine_of(narrow).stats().running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = engine_of(narrow).stats().generated_tokens
    asyncio.run(run())
    wait_until(lambda: is_idle(narrow))
    assert engine_of(narrow).stats().generated_tokens - before < LONG["max_tokens"]


# Errors.


def client_of(guarded: Guarded, key: str) -> openai.OpenAI:  # noqa: F811
    return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.tokens[key], max_retries=0)


@pytest.mark.parametrize(
    ("key", "more", "kind", "code"),
    [
        ("user", {"temperature": 9}, openai.BadRequestError, None),
        ("user", {"max_tokens": 9999}, openai.BadRequestError, "context_length_exceeded"),
        ("user", {"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ("old", {}, openai.AuthenticationError, "invalid_api_key"),
        ("admin", {}, openai.PermissionDeniedError, "insufficient_scope"),
        ("upper", {"model": "digit"}, openai.NotFoundError, "model_not_found"),
    ],
)
def test_errors_have_the_clients_own_classes(
    guarded: Guarded,  # noqa: F811
    key: str,
    more: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str | None,
) -> None:
    with client_of(guarded, key) as client, pytest.raises(kind) as caught:
        ask(client, **{"max_tokens": 1, **more})
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert caught.value.request_id
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"] in caught.value.message


def test_a_used_up_rate_is_a_rate_limit_error(guarded: Guarded) -> None:  # noqa: F811
    with client_of(guarded, "short") as client:
        ask(client)  # more tokens than a minute has
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_conflict_is_a_conflict_error(guarded: Guarded) -> None:  # noqa: F811
    body = {"lora_name": "sql", "lora_path": str(guarded.root / "sql"), "expected_generation": 7}
    with client_of(guarded, "all") as client, pytest.raises(openai.ConflictError) as caught:
        client.post("/load_lora_adapter", cast_to=object, body=body)
    assert caught.value.status_code == 409


def test_a_body_too_large_has_its_status(served: Served) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(served.client(), "x" * (5 << 20))
    assert caught.value.status_code == 413


def test_no_server_is_a_connection_error() -> None:
    with (
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()
