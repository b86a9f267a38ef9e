"""Tokens that are parts of characters keep their bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.token_text import TokenText, TokenTexts, token_text

from ..tiny import make_tokenizer

TOKENIZER = make_tokenizer()


@given(st.text(max_size=20))
def test_the_bytes_of_tokens_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    shown = [token_text(TOKENIZER, token_id) for token_id in ids]
    assert b"".join(token.spelling or b"" for token in shown).decode() == text


def test_parts_of_characters_are_told_apart() -> None:
    first, second = (token_text(TOKENIZER, i) for i in TOKENIZER("ü")["input_ids"])
    assert first == TokenText("\ufffd", b"\xc3")
    assert (first.unique_text, second.unique_text) == ("bytes:\\xc3", "bytes:\\xbc")
    assert token_text(TOKENIZER, TOKENIZER("x")["input_ids"][0]).unique_text == "x"


def test_an_answer_decodes_each_token_once() -> None:
    texts = TokenTexts(TOKENIZER)
    assert texts[65] == token_text(TOKENIZER, 65)
    assert texts[65] is texts[65]
    assert list(texts) == [65]
