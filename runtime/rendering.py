"""Examples as token ids, one by one and in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..adapters.errors import DataError
from ..routers.data import Example

BATCH_SIZE = 8


@dataclass(frozen=True)
class Rendered:
    """An example as token ids: the prompt, and after `prompt_length` tokens the answer, if any."""

    token_ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Batch:
    """Rendered examples, padded on the right.

    token_ids: [b, t]. mask: [b, t], True at tokens that are no padding. answers: [b, t], True at
    the tokens of answers; at all tokens of an example that has none.
    """

    token_ids: Tensor
    mask: Tensor
    answers: Tensor


def render(
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    example: Example,
    *,
    max_length: int | None = None,
) -> Rendered:
    """An example as the backbone sees it: by its chat template, else one user message as it stands.

    The answer's tokens include the end of the turn, or the end token without a chat template.

    max_length: most tokens of prompt and answer.

    Raises:
        DataError: too long, a conversation for a backbone without a chat template, or one that
            the chat template refuses.
    """
    prompt = _prompt_ids(tokenizer, example)
    answer = [] if example.answer is None else _answer_ids(tokenizer, example, prompt)
    length = len(prompt) + len(answer)
    if not prompt:
        raise DataError(f"{_named(example)} is no token at all: give a text")
    if max_length is not None and length > max_length:
        raise DataError(
            f"{_named(example)} is {length:,} tokens with its answer, the limit is {max_length:,}: "
            "shorten it"
        )
    return Rendered((*prompt, *answer), len(prompt))


def batches(prompts: Sequence[Rendered], *, size: int = BATCH_SIZE) -> Iterator[Batch]:
    """Batches of at most `size` prompts of like length, the longest first."""
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        token_ids = torch.zeros(len(rows), len(rows[0].token_ids), dtype=torch.long)
        mask, answers = (torch.zeros_like(token_ids, dtype=torch.bool) for _ in range(2))
        for k, row in enumerate(rows):
            length = len(row.token_ids)
            token_ids[k, :length] = torch.tensor(row.token_ids)
            mask[k, :length] = True
            answers[k, row.prompt_length % length : length] = True
        yield Batch(token_ids, mask, answers)


def _prompt_ids(tokenizer: Any, example: Example) -> list[int]:  # noqa: ANN401
    if tokenizer.chat_template:
        return _templated(tokenizer, example, example.conversation, add_generation_prompt=True)
    if len(example.messages) > 1 or example.messages[0].role != "user":
        raise DataError(
            f"{_named(example)} is a conversation, and this backbone has no chat template: give "
            "single prompts"
        )
    return list(tokenizer(example.prompt)["input_ids"])


def _answer_ids(tokenizer: Any, example: Example, prompt: list[int]) -> list[int]:  # noqa: ANN401
    """The answer's tokens after a prompt's, as the chat template continues it where it does."""
    assert example.answer is not None
    if tokenizer.chat_template:
        turn = {"role": "assistant", "content": example.answer}
        turns = [*example.conversation, turn]
        whole = _templated(tokenizer, example, turns, add_generation_prompt=False)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
    ids = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def _templated(
    tokenizer: Any,  # noqa: ANN401
    example: Example,
    turns: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"the chat template refuses {_named(example)}: {error}") from error
    return list(ids)


def _named(example: Example) -> str:
    """The example for messages: its file and line where they are known, and how it begins."""
    return f"{example.where + ': ' if example.where else ''}the prompt {example.prompt[:60]!r}"
