"""Data files: what is read, and one corrupt file per error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergeroute.adapters.errors import DataError
from mergeroute.routers.data import read_examples


def written(folder: Path, *lines: object) -> Path:
    file = folder / "data.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


def test_prompts_and_conversations_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One line\u2028or two?"},
    ]
    file = written(
        tmp_path,
        {"task": "roman", "prompt": "14?", "answer": "XIV", "wording": "known"},
        "",
        json.dumps({"messages": turns, "answer": "b", "options": ["a", "b"]}, ensure_ascii=False),
    )
    lone, chat = read_examples(file, needs=["answer"])
    assert (lone.task, lone.prompt, lone.answer, lone.options) == ("roman", "14?", "XIV", None)
    assert lone.conversation == [{"role": "user", "content": "14?"}]
    assert (lone.unused, lone.where) == (("wording",), f"{file}, line 1")
    assert (chat.task, chat.prompt, chat.options) == (None, turns[1]["content"], ("a", "b"))
    assert chat.conversation == turns
    assert (chat.unused, chat.where) == ((), f"{file}, line 3")


def test_a_conversation_may_end_with_the_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "14?"}, {"role": "assistant", "content": "XIV"}]
    (example,) = read_examples(written(tmp_path, {"messages": turns}), needs=["answer"])
    assert (example.conversation, example.answer) == (turns[:1], "XIV")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "write one JSON object a line"),
        ("[1]", "write one JSON object a line"),
        ('{"prompt": "\\xff"}', "write one JSON object a line"),
        ({"task": "x", "answer": "y"}, "give either prompt or messages"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, "give either"),
        ({"task": 3, "prompt": "x", "answer": "y"}, "task is 3: Input should be a valid string"),
        ({"task": "", "prompt": "x", "answer": "y"}, "task is ''"),
        ({"task": "x", "prompt": "", "answer": "y"}, "prompt is ''"),
        ({"task": "x", "prompt": 3, "answer": "y"}, "prompt is 3"),
        ({"task": "x", "prompt": "x", "answer": " "}, "answer is missing or blank"),
        ({"task": "x", "prompt": "x"}, "answer is missing or blank: every line needs task and"),
        ({"prompt": "x", "answer": "y"}, "task is missing"),
        ({"task": "x", "messages": [], "answer": "y"}, "messages hold none of a user's: give"),
        ({"messages": [{"role": "system", "content": "y"}]}, "messages hold none of a user's"),
        (
            {"messages": [{"role": r, "content": "y"} for r in ("system", "assistant")]},
            "messages hold none of a user's",
        ),
        ({"task": "x", "messages": [{"role": "me", "content": "y"}]}, "messages.0.role is 'me'"),
        ({"task": "x", "messages": [{"role": "user"}]}, "messages.0.content is missing"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
            | {"answer": "y"},
            "given twice",
        ),
        ({"prompt": "x", "answer": "c", "options": ["a", "b"]}, "make it one of the options"),
        ({"prompt": "x", "answer": "a", "options": ["a", "A "]}, "hold one twice"),
        ({"prompt": "x", "answer": "a", "options": ["a"]}, "options is ['a']: give at least 2"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: object, words: str) -> None:
    file = written(tmp_path, {"task": "x", "prompt": "x", "answer": "y"}, line)
    with pytest.raises(DataError) as caught:
        read_examples(file, needs=["task", "answer"])
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_examples(tmp_path / "nothing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "ü"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"line 1: the file is not UTF-8: convert it$"):
        read_examples(tmp_path / "latin.jsonl")
    empty = written(tmp_path, "", " ")
    with pytest.raises(DataError, match=r'holds no examples: give JSON lines, {"prompt": \.{3}}$'):
        read_examples(empty)
    with pytest.raises(DataError, match=r'{"task": \.{3}, "prompt": \.{3}, "answer": \.{3}}$'):
        read_examples(empty, needs=["task", "answer"])
