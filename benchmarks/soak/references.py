"""What is asked, and what the merged models answer: computed beforehand by plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.runtime.merging import merge_into
from mergeroute.runtime.module_stack import ModuleStack

NEAR_TIE = 1e-3
"""Logits that are nearer to each other than this may be ordered by rounding: such answers are left
out of the table.
"""

HOT = {f"hot{k}": pair for k, pair in enumerate((("roman", "german"), ("caesar", "spanish")))}
"""Names that are loaded, replaced and unloaded while requests run, and the modules of the bank that
their two contents are made of.
"""

Mix = tuple[tuple[str, float], ...]
"""A blend by content: (module, or `hot0/german`; weight), sorted; empty: the backbone alone."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens without regard to end tokens, and their text; ended: up to the first end token,
    which is one of the tokens and has no text.
    """

    tokens: tuple[int, ...]
    text: str
    ended_tokens: tuple[int, ...]
    ended_text: str


@dataclass(frozen=True)
class Prompt:
    """A user message, and its ids as the chat template renders it."""

    text: str
    ids: tuple[int, ...]


class References:
    """Prompts, contents of modules, and the table of answers.

    count: tokens of every answer.
    """

    def __init__(self, bank: Bank, *, prompts: int, count: int) -> None:
        path = bank.backbone.path
        transformers.utils.logging.disable_progress_bar()
        self.count = count
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        layers = bank.backbone.shapes
        self.bank = {m.name: Module.load(m.path, name=m.name, layers=layers) for m in bank.modules}
        self.contents = {**self.bank, **_hot_contents(self.bank)}
        self.prompts = tuple(map(self._prompt, _texts(bank)[:prompts]))
        self._answers: dict[tuple[int, Mix], Answer | None] = {}

    def save_contents(self, root: Path) -> None:
        """The hot names' contents as PEFT folders, `hot0/german` under a root."""
        for content in self.contents.keys() - self.bank.keys():
            self.contents[content].save(root / content)

    def room_for(self, modules: int) -> int:
        """Bytes that so many modules of the bank take in an engine."""
        stack = ModuleStack(copy.deepcopy(self._model))
        prepared = [stack.prepare(module) for module in list(self.bank.values())[:modules]]
        return stack.room.needed([one.footprint for one in prepared])

    def prepare(self, mixes: Iterable[Mix]) -> None:
        """Fill the table for all prompts."""
        for mix in mixes:
            merged = copy.deepcopy(self._model)
            merge_into(merged, self.contents, Blend(dict(mix)))
            for number, prompt in enumerate(self.prompts):
                self._answers[number, mix] = self._generate(merged, prompt.ids)

    def prepare_once(self, mix: Mix) -> None:
        """Fill the table for one mix, if it is not there."""
        if (0, mix) not in self._answers:
            self.prepare([mix])

    def find(self, number: int, mix: Mix) -> Answer | None:
        """The answer to a prompt; None where it hangs on a near tie."""
        return self._answers[number, mix]

    @torch.inference_mode()
    def _generate(self, model: Any, ids: tuple[int, ...]) -> Answer | None:
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=self.count,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(out.logits)[:, 0].topk(2).values
        if (best[:, 0] - best[:, 1]).min() < NEAR_TIE:
            return None
        tokens = tuple(out.sequences[0, len(ids) :].tolist())
        end = model.generation_config.eos_token_id
        ended = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        return Answer(tokens, self._text(tokens), ended, self._text(ended))

    def _text(self, tokens: tuple[int, ...]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _prompt(self, text: str) -> Prompt:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return Prompt(text, tuple(ids))


def mixes_of(names: Iterable[str]) -> list[Mix]:
    """What of a bank's modules is asked for by name: backbone, each alone, and some blends."""
    alone = [((name, 1.0),) for name in names]
    a, b, c, *_ = sorted(names)
    blends = [{a: 0.5, b: 0.5}, {b: 0.75, c: -0.25}, {a: 0.25, b: 0.25, c: 0.5}, {c: 1.5}]
    return [(), *alone, *(tuple(sorted(blend.items())) for blend in blends)]


def hot_mixes(name: str, content: str) -> list[tuple[dict[str, float], Mix]]:
    """How a hot name is asked for: the blend that the client names, and what that is."""
    named = [{name: 1.0}, {name: 0.75, "english": 0.25}]
    return [
        (blend, tuple(sorted((content if n == name else n, w) for n, w in blend.items())))
        for blend in named
    ]


def contents_of(name: str) -> tuple[str, ...]:
    """The contents of a hot name, also their folders under the module root."""
    return tuple(f"{name}/{origin}" for origin in HOT[name])


def _hot_contents(bank: Mapping[str, Module]) -> dict[str, Module]:
    """The bank's own modules a little weaker: other weights, and answers that differ by content."""
    return {
        content: Module(content.replace("/", "-"), _scaled(bank[origin], 0.875))
        for name, origins in HOT.items()
        for content, origin in zip(contents_of(name), origins, strict=True)
    }


def _scaled(module: Module, by: float) -> dict[str, LowRank]:
    return {layer: LowRank(d.left * by, d.right) for layer, d in module.deltas.items()}


def _texts(bank: Bank) -> list[str]:
    """Samples of every module, one that is long, and one that is no module's."""
    firsts, seconds = ([module.samples[k] for module in bank.modules] for k in (0, 1))
    long = " ".join(seconds) + " " + firsts[0]
    return [firsts[0], long, "Hello, how are you?", *firsts[1:], *seconds]
