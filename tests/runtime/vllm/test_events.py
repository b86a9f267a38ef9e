"""Server-sent events, however the bytes are cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm import events
from mergeroute.runtime.vllm.events import data_of


async def pieces_of(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def read(pieces: Sequence[bytes]) -> list[bytes]:
    async def all_of_them() -> list[bytes]:
        return [data async for data in data_of(pieces_of(pieces))]

    return asyncio.run(all_of_them())


TEXTS = st.lists(st.text(alphabet="a\u2028\x85\x0b\r é{}", max_size=5).map(str.strip), max_size=5)


@given(TEXTS, st.lists(st.integers(1, 7), min_size=1, max_size=30))
def test_cuts_do_not_matter(texts: list[str], sizes: list[int]) -> None:
    whole = b"".join(f"data: {text}\n\n".encode() for text in texts)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(whole[start : start + size])
        start += size
    pieces.append(whole[start:])
    assert read(pieces) == [text.encode().strip() for text in texts]


def test_comments_and_other_fields_are_left_out_and_so_is_half_an_event() -> None:
    stream = b": ping\n\nevent: x\ndata: 1\nid: 7\n\ndata:2\r\n\ndata: ha"
    assert read([stream]) == [b"1", b"2"]


def test_an_event_without_an_end_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_MOST_BYTES", 100)
    with pytest.raises(EngineError, match="over 100 bytes"):
        read([b"data: " + b"x" * 60, b"y" * 60])
