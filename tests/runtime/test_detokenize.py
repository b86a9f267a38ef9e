"""Streamed text is the whole text, in whole characters, up to the first stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from mergeroute.runtime.detokenize import TextStream

from ..tiny import make_tokenizer

TOKENIZER = make_tokenizer()
END, USER = TOKENIZER.convert_tokens_to_ids(["<|end|>", "<|user|>"])
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.text("äß€漢字🐍👩‍🔬a", max_size=12)
few = settings(deadline=None, max_examples=60)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    return ids


BYTE_IDS = {
    byte: TOKENIZER.convert_tokens_to_ids(c)
    for byte, c in (
        (0xC3, "Ã"),
        (0xF0, "ð"),
        (0x9F, "Ł"),
        (0xFF, "ÿ"),
        (0x41, "A"),
    )
}  # GPT-2's printable names of bytes


def stream(ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What is shown after each token, then at the end; and whether a stop text ended it."""
    out = TextStream(TOKENIZER, stops)
    shown = []
    for token in ids:
        shown.append(out.push(token))
        if out.is_stopped:
            break
    return [*shown, out.flush()], out.is_stopped


def truncated(text: str, stops: Sequence[str]) -> str:
    """The obvious reference: grow the text by a character and look for a stop text at its end."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@few
@given(texts)
def test_streamed_text_is_the_whole_text_in_whole_characters(text: str) -> None:
    shown, is_stopped = stream(ids_of(text))
    assert "".join(shown) == text
    assert not is_stopped
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in shown)


@few
@given(texts.filter(lambda text: "\ufffd" not in text))
def test_each_character_is_shown_as_soon_as_it_is_whole(text: str) -> None:
    shown, _ = stream(ids_of(text))
    expected = [piece for c in text for piece in [*[""] * (len(c.encode()) - 1), c]]
    assert shown == [*expected, ""]


@few
@given(texts, st.lists(st.text("äab🐍", min_size=1, max_size=3), max_size=4))
def test_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    shown, is_stopped = stream(ids_of(text), stops)
    assert "".join(shown) == truncated(text, stops)
    assert is_stopped == any(stop in text for stop in stops)


@settings(deadline=None, max_examples=150)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_that_overlap_each_other_and_themselves(text: str, stops: list[str]) -> None:
    shown, is_stopped = stream(ids_of(text), stops)
    assert "".join(shown) == truncated(text, stops)
    assert is_stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("abcSTOPdef", ["STOP"], "abc"),
        ("STOPdef", ["STOP"], ""),
        ("abcSTOSTOP", ["STOP"], "abcSTO"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("x\n\ny", ["\n\n", "y"], "x"),
        ("x\ny", ["\n\n"], "x\ny"),
        ("abcd", ["bcd", "c"], "ab"),
        ("abcd", ["cd", "abcd"], ""),
        ("grün!", ["ün"], "gr"),
        ("grü", ["ün"], "grü"),
        ("a🐍b", ["🐍"], "a"),
        ("no stop", [], "no stop"),
    ],
)
def test_known_stops(text: str, stops: list[str], shown: str) -> None:
    pieces, is_stopped = stream(ids_of(text), stops)
    assert "".join(pieces) == shown
    assert is_stopped == any(stop in text for stop in stops)


def test_text_that_may_begin_a_stop_is_held_back_and_no_more() -> None:
    shown, _ = stream(ids_of("1 ST 2 STO"), ["STOP", "2 x"])
    assert shown == ["1", " ", "", "", "ST ", "", "", "2 ", "", "", "STO"]


def test_nothing_is_shown_twice_by_flushing_twice() -> None:
    out = TextStream(TOKENIZER, ["STOP"])
    shown = [out.push(token) for token in [*ids_of("aST"), BYTE_IDS[0xC3]]]
    assert [*shown, out.flush(), out.flush()] == ["a", "", "", "", "ST\ufffd", ""]


@pytest.mark.parametrize(
    ("tail", "shown"),
    [
        ([0xC3], "a\ufffd"),
        ([0xF0, 0x9F], "a\ufffd"),
        ([0xFF], "a\ufffd"),
        ([0xFF, 0xFF], "a\ufffd\ufffd"),
        ([0xC3, 0x41], "a\ufffdA"),
        ([0xFF, 0x41, 0xC3], "a\ufffdA\ufffd"),
    ],
)
def test_bytes_that_make_no_character_are_shown_as_such_and_never_lost(
    tail: list[int], shown: str
) -> None:
    ids = ids_of("a") + [BYTE_IDS[byte] for byte in tail]
    assert "".join(stream(ids)[0]) == shown == TOKENIZER.decode(ids)


@few
@given(st.lists(st.integers(0, 255), max_size=12))
def test_any_bytes_are_shown_as_the_whole_decode_shows_them(ids: list[int]) -> None:
    assert "".join(stream(ids)[0]) == TOKENIZER.decode(ids)


def make_fallback_tokenizer() -> Any:
    """As Llama 2, Mistral and Gemma have it: words with spaces as ▁, other characters in bytes."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for word in ("▁", "▁Hello", "▁the", "a", "ä"):
        vocabulary[word] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


FALLBACK = make_fallback_tokenizer()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 261) | st.integers(129, 261) | st.just(258), max_size=10))
def test_bytes_between_words_break_no_stream(ids: list[int]) -> None:
    """A token's bytes may change how those before it decode; what follows is shown all the same."""
    out = TextStream(FALLBACK)
    shown = "".join([*(out.push(token) for token in ids), out.flush()])
    whole = FALLBACK.decode(ids)
    if "\ufffd" not in whole:
        assert shown == whole
    assert shown.count("Hello") == ids.count(FALLBACK.convert_tokens_to_ids("▁Hello"))


def test_words_and_bytes_of_a_fallback_tokenizer() -> None:
    words = [FALLBACK.convert_tokens_to_ids(word) for word in ("▁Hello", "▁the", "a")]
    snake = [1 + byte for byte in "🐍".encode()]
    out = TextStream(FALLBACK)
    shown = [out.push(token) for token in [*words, *snake, words[1]]]
    assert shown == ["Hello", " the", "a", "", "", "", "🐍", " the"]


def test_a_stop_text_ends_before_what_is_incomplete() -> None:
    shown, is_stopped = stream([*ids_of("aX"), BYTE_IDS[0xC3]], ["X"])
    assert ("".join(shown), is_stopped) == ("a", True)


@few
@given(texts, st.lists(st.sampled_from([END, USER]), min_size=1, max_size=3))
def test_special_tokens_are_skipped_wherever_they_stand(text: str, special: list[int]) -> None:
    ids = [t for c in text for t in (*special, *ids_of(c))] + special
    assert "".join(stream(ids)[0]) == text
    assert "".join(stream(ids, ["<|end|>"])[0]) == text


def test_no_tokens_give_no_text() -> None:
    assert stream([]) == ([""], False)
    assert stream([END]) == (["", ""], False)
