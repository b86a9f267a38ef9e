"""Exact-match accuracy of greedy answers."""

from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .tasks import Example
from .tokenizer import END, PAD
from .train import IGNORED, collate

BATCH_SIZE = 100


def greedy_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Answer each prompt greedily; an answer that does not end keeps no end token."""
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    batch = tokenizer(rendered, return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    texts: list[str] = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    return [text.partition(PAD)[0] for text in texts]


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> float:
    """Return the share of examples, in 0 to 1, answered exactly and then ended."""
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.prompt))
    right = 0
    for start in range(0, len(ordered), BATCH_SIZE):
        chunk = ordered[start : start + BATCH_SIZE]
        wanted = [example.answer + END for example in chunk]
        longest = max(len(answer.encode()) for answer in wanted) - len(END) + 1
        answers = greedy_answers(
            model, tokenizer, [example.prompt for example in chunk], max_new_tokens=longest
        )
        right += sum(got == want for got, want in zip(answers, wanted, strict=True))
    return right / len(examples)


def forced_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> float:
    """Return what `accuracy` does, from one forward pass a batch instead of one a token.

    A greedy answer is right if and only if each token of the right one is the likeliest after those
    before it.
    """
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    right = 0
    for start in range(0, len(ordered), BATCH_SIZE):
        batch = collate(ordered[start : start + BATCH_SIZE], tokenizer)
        with torch.inference_mode():
            likeliest = model(input_ids=batch.token_ids, use_cache=False).logits.argmax(-1)
        is_right = (likeliest == batch.targets) | (batch.targets == IGNORED)
        right += int(is_right.all(1).sum())
    return right / len(examples)
