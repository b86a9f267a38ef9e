"""The OpenAI routes through the unmodified `openai` client and a real server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.digest import short

from ..tiny import make_model, make_tokenizer, reference_tokens
from .conftest import Served, chat_ids

PROMPT = "shout the word 7"


def ask(
    client: openai.OpenAI, prompt: str = PROMPT, **more: object
) -> openai.types.chat.ChatCompletion:
    options = {"model": "auto", "temperature": 0, "max_tokens": 12, **more}
    return client.chat.completions.create(  # type: ignore[call-overload, no-any-return]
        messages=[{"role": "user", "content": prompt}], **options
    )


def expected_text(served: Served, blend: Blend, prompt: str = PROMPT, count: int = 12) -> str:
    modules = {m.name: served.bank.load(m) for m in served.bank.modules}
    ids = chat_ids(served.bank.backbone, prompt)
    tokens = reference_tokens(make_model(), modules, blend, ids, count)
    text: str = make_tokenizer().decode(tokens, skip_special_tokens=True)
    return text


@pytest.mark.parametrize(("prompt", "module"), [(PROMPT, "upper"), ("0 1 2 3 4 9", "digit")])
def test_auto_answers_with_the_module_that_the_router_picks(
    served: Served, prompt: str, module: str
) -> None:
    raw = served.client().chat.completions.with_raw_response.create(
        model="auto",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=12,
    )
    answer = raw.parse()
    assert raw.headers["x-mergeroute-blend"] == f"{module}=1"
    assert raw.headers["x-mergeroute-target"] == "auto"
    assert raw.headers["x-mergeroute-bank"] == served.bank.digest
    assert raw.headers["x-mergeroute-router"] == "prototype"
    assert float(raw.headers["x-mergeroute-confidence"]) > 0.9
    assert raw.headers["x-mergeroute-abstained"] == "0"
    assert len(raw.headers["x-request-id"]) == 32
    assert answer.choices[0].message.content == expected_text(served, Blend({module: 1}), prompt)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "auto"
    assert answer.system_fingerprint is not None
    assert short(served.bank.digest) in answer.system_fingerprint


def test_a_stream_carries_the_same_text_role_first_and_usage_last(served: Served) -> None:
    client = served.client()
    whole = ask(client)
    chunks = list(
        client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": PROMPT}],
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == len(chat_ids(served.bank.backbone, PROMPT))
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize(
    ("model", "body", "blend"),
    [
        ("upper", {}, {"upper": 1}),
        ("zoo:digit", {}, {"digit": 1}),
        ("tiny", {}, {}),
        ("blend:upper=0.5,digit=-0.25", {}, {"upper": 0.5, "digit": -0.25}),
        ("auto", {"blend": {"upper": 0.503}}, {"upper": 0.5}),
        ("zoo", {"blend": {"digit": 2.0}}, {"digit": 2.0}),
        ("tiny", {"blend": {"upper": 1.0}}, {"upper": 1.0}),
    ],
)
def test_every_kind_of_target_is_exact(
    served: Served, model: str, body: dict[str, object], blend: dict[str, float]
) -> None:
    answer = ask(served.client(), model=model, extra_body=body)
    assert answer.choices[0].message.content == expected_text(served, Blend(blend))
    assert answer.model == model


def test_n_choices_are_seeded_apart_and_reproducible(served: Served) -> None:
    client = served.client()
    first, second = (ask(client, n=3, seed=5, temperature=1.5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert first.usage is not None
    assert first.usage.completion_tokens == 36
    assert first.usage.prompt_tokens == len(chat_ids(served.bank.backbone, PROMPT))


def test_logprobs_of_chat_have_one_entry_per_token(served: Served) -> None:
    answer = ask(served.client(), logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_completions_take_texts_token_ids_and_several_prompts(served: Served) -> None:
    client = served.client()
    options = {"model": "upper", "temperature": 0, "max_tokens": 5}
    texts = ["abc", "hello there"]
    single = [client.completions.create(prompt=t, **options).choices[0].text for t in texts]  # type: ignore[call-overload]
    together = client.completions.create(prompt=texts, **options)  # type: ignore[call-overload]
    assert [choice.text for choice in together.choices] == single
    ids = [make_tokenizer()(text)["input_ids"] for text in texts]
    by_ids = client.completions.create(prompt=ids, **options)  # type: ignore[call-overload]
    assert [choice.text for choice in by_ids.choices] == single
    assert together.usage.total_tokens == sum(map(len, ids)) + 10


def test_completions_stream_and_give_logprobs(served: Served) -> None:
    client = served.client()
    options = {"model": "upper", "prompt": "abc", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**options, logprobs=2)  # type: ignore[call-overload]
    chunks = list(client.completions.create(**options, logprobs=2, stream=True))  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert streamed == whole.choices[0].logprobs.tokens
    assert len(streamed) == len(whole.choices[0].logprobs.text_offset) == 6
    assert all(1 <= len(top) <= 2 for top in whole.choices[0].logprobs.top_logprobs)


def test_models_lists_every_target_with_root_and_parent(served: Served) -> None:
    listed = {model.id: model.to_dict() for model in served.client().models.list()}
    assert list(listed) == ["auto", "tiny", "zoo", "upper", "digit"]
    assert listed["upper"]["parent"] == "tiny"
    assert listed["tiny"]["parent"] is None
    assert listed["zoo"]["root"] == served.bank.digest
    assert served.client().models.retrieve("zoo:upper").id == "zoo:upper"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("nobody")


def test_many_clients_at_once_each_get_their_own_blend(served: Served) -> None:
    blends = [Blend({"upper": k / 8, "digit": (k % 3) / 4}) for k in range(16)]

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=str(blend) if blend else "tiny",
                        messages=[{"role": "user", "content": PROMPT}],
                        temperature=0,
                        max_tokens=12,
                    )
                    for blend in blends
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask_all()) == [expected_text(served, blend) for blend in blends]


def test_a_repeated_prompt_reports_cached_tokens(served: Served) -> None:
    prompt = "a prompt long enough to be worth the reuse of its keys and values"
    ask(served.client(), prompt, model="digit")
    usage = ask(served.client(), prompt, model="digit").usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
