"""Examples as tokens, with and without a chat template, and their padded batches."""

from __future__ import annotations

from typing import Any

import pytest

from mergeroute.adapters.errors import DataError
from mergeroute.routers.data import Example
from mergeroute.runtime.rendering import Rendered, batches, render
from tests.tiny import make_tokenizer

HELLO = Example.model_validate({"prompt": "hello"})
ANSWERED = Example.model_validate({"prompt": "hello", "answer": "yes"})
CONVERSATION = Example.model_validate(
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hello"},
        ],
        "answer": "yes",
    }
)
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"


def text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    decoded: str = tokenizer.decode(ids)
    return decoded


def test_a_prompt_is_rendered_by_the_chat_template() -> None:
    tokenizer = make_tokenizer()
    rendered = render(tokenizer, HELLO)
    assert text(tokenizer, rendered.token_ids) == "<|user|>user:hello<|end|><|user|>"
    assert rendered.prompt_length == len(rendered.token_ids)


def test_an_answer_follows_as_the_template_continues() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN + "{% if add_generation_prompt %}[assistant]{% endif %}"
    rendered = render(tokenizer, CONVERSATION)
    prompt = text(tokenizer, rendered.token_ids[: rendered.prompt_length])
    assert prompt == "[system]be kind|[user]hello|[assistant]"
    assert text(tokenizer, rendered.token_ids[rendered.prompt_length :]) == "yes|"


def test_an_answer_that_the_template_would_not_continue_ends_with_the_end_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN + "{% if add_generation_prompt %}think:{% endif %}"
    rendered = render(tokenizer, ANSWERED)
    assert text(tokenizer, rendered.token_ids[: rendered.prompt_length]) == "[user]hello|think:"
    assert text(tokenizer, rendered.token_ids[rendered.prompt_length :]) == "yes<|end|>"


def test_without_a_template_a_prompt_stands_as_it_is() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    rendered = render(tokenizer, ANSWERED)
    assert text(tokenizer, rendered.token_ids) == "helloyes<|end|>"
    assert rendered.prompt_length == 5
    tokenizer.eos_token = None
    assert text(tokenizer, render(tokenizer, ANSWERED).token_ids) == "helloyes"
    with pytest.raises(DataError, match="no chat template: give single prompts"):
        render(tokenizer, CONVERSATION)


def test_what_cannot_be_rendered_is_named() -> None:
    tokenizer = make_tokenizer()
    whole = len(render(tokenizer, ANSWERED).token_ids)
    assert render(tokenizer, ANSWERED, max_length=whole) == render(tokenizer, ANSWERED)
    with pytest.raises(DataError, match=rf"'hello' is {whole} tokens .* limit is {whole - 1}"):
        render(tokenizer, ANSWERED, max_length=whole - 1)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(DataError, match="refuses the prompt 'hello': no system messages"):
        render(tokenizer, HELLO)
    read = Example.parse(b'{"prompt": "hello"}', where="data.jsonl, line 7")
    with pytest.raises(DataError, match=r"refuses data\.jsonl, line 7: the prompt 'hello'"):
        render(tokenizer, read)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the prompt '' is no token"):
        render(tokenizer, HELLO.model_copy(update={"messages": (_said(""),)}))


def test_batches_pad_on_the_right_and_lose_nothing() -> None:
    prompts = [Rendered(tuple(range(1, n + 1)), n) for n in (2, 5, 1, 4, 3)]
    found = list(batches(prompts, size=2))
    assert [tuple(batch.token_ids.shape) for batch in found] == [(2, 5), (2, 3), (1, 1)]
    rows = [
        tuple(row[kept].tolist())
        for batch in found
        for row, kept in zip(batch.token_ids, batch.mask, strict=True)
    ]
    assert sorted(rows) == sorted(prompt.token_ids for prompt in prompts)
    assert found[0].token_ids[1].tolist() == [1, 2, 3, 4, 0]
    assert found[0].mask[1].tolist() == [True] * 4 + [False]
    assert list(batches([])) == []


def _said(content: str) -> Any:
    return HELLO.messages[0].model_copy(update={"content": content})
