"""Prompts, and the turns in them that are routed."""

from __future__ import annotations

import pytest

from mergeroute.routers.base import Turn
from mergeroute.serving.chat import chat_prompt, text_prompt, user_prompt
from mergeroute.serving.errors import ApiError
from mergeroute.serving.schemas.messages import Message

from ..tiny import make_tokenizer

TOKENIZER = make_tokenizer()


def rendered(role: str, text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(f"<|user|>{role}:{text}<|end|><|user|>")["input_ids"])


def test_each_user_message_is_a_turn_of_its_own() -> None:
    said = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", ""), ("assistant", "c")]
    prompt = chat_prompt(TOKENIZER, [Message(role=r, content=t) for r, t in said])
    assert prompt.turns == (Turn(rendered("user", "a"), "a"), Turn(rendered("user", ""), ""))
    assert prompt.turns is prompt.turns


def test_without_a_user_message_all_is_one_turn() -> None:
    said = [("developer", "be kind"), ("assistant", "hello")]
    prompt = chat_prompt(TOKENIZER, [Message(role=r, content=t) for r, t in said])
    assert prompt.turns == (Turn(prompt.token_ids, "be kind\nhello"),)


def test_a_text_and_its_token_ids_are_the_same_turn() -> None:
    ids = tuple(TOKENIZER("héllo")["input_ids"])
    for prompt in (text_prompt(TOKENIZER, "héllo"), text_prompt(TOKENIZER, list(ids))):
        assert prompt.turns == (Turn(ids, "héllo"),)


def test_a_users_words_are_a_message_where_there_is_a_template() -> None:
    assert user_prompt(TOKENIZER, "a").turns == (Turn(rendered("user", "a"), "a"),)
    bare = make_tokenizer()
    bare.chat_template = None
    assert user_prompt(bare, "a").turns == text_prompt(bare, "a").turns


def test_arguments_that_the_template_does_not_look_at_are_refused_by_name() -> None:
    thinking = make_tokenizer()
    thinking.chat_template = (
        "{% generation %}{% if not mood is defined %}{% set mood = 'calm' %}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{{ mood }}{% endgeneration %}{{ 'think' if enable_thinking is defined else namespace() }}"
    )
    said = [Message(role="user", content="a")]
    told = chat_prompt(thinking, said, {"mood": "glad", "enable_thinking": True})
    assert told.token_ids == tuple(thinking("agladthink")["input_ids"])
    with pytest.raises(ApiError, match=r"'moods'.*allowed are enable_thinking, mood") as refused:
        chat_prompt(thinking, said, {"mood": "glad", "moods": 1})
    assert refused.value.param == "chat_template_kwargs"
    plain = chat_prompt(TOKENIZER, said, {"enable_thinking": False}).token_ids
    assert plain == chat_prompt(TOKENIZER, said, {}).token_ids
    with pytest.raises(ApiError, match="looks at none"):
        chat_prompt(TOKENIZER, said, {"enable_thinking": True})
