"""A bank to measure servers on: a random Llama, many small LoRA modules, a router over a few."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers

from mergeroute.adapters.backbone import Backbone, linear_layers
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.routers.base import Query
from mergeroute.routers.loading import signal_of
from mergeroute.routers.settings import LearnedSettings, SignalSettings
from mergeroute.routers.store import save_router
from mergeroute.routers.training import Labelled, fit
from mergeroute.runtime.torch_engine import TorchEngine

HOT = 8
"""Modules that the router knows, and that hot traffic goes to."""

RANK = 4
CHANGED = ("q_proj", "v_proj")
"""Layers that modules change, as PEFT does unless told otherwise."""

_LEARNT_WORDS = 12
_FITTED_PER_MODULE = 10
_NONE_PROMPTS = 120
_CONTEXT = 2048


@dataclass(frozen=True)
class Made:
    """Where banks lie: with HOT modules, and with many. module_bytes: of one in memory."""

    few: Path
    many: Path
    module_bytes: int


def module_name(index: int) -> str:
    """Of a module, by its number."""
    return f"m{index}"


def make_prompt(content: random.Random, words: int, module: int | None = None) -> str:
    """Random words; of a module's own words where it is named, so that a router can tell."""
    low, high = (_LEARNT_WORDS * HOT, 30_000) if module is None else _own(module)
    return " ".join(f"w{content.randrange(low, high)}" for _ in range(words))


def _own(module: int) -> tuple[int, int]:
    return _LEARNT_WORDS * module, _LEARNT_WORDS * (module + 1)


def make_banks(folder: Path, shape: dict[str, int], *, count: int) -> Made:
    """Write both banks. count: modules of the larger one."""
    model = _make_model(shape)
    model.save_pretrained(folder / "random")
    _make_tokenizer(shape["vocab_size"]).save_pretrained(folder / "random")
    backbone = Backbone.open(folder / "random")
    modules = list(_write_modules(model, folder / "modules", count))
    settings, fitted = _fit_router(backbone, shape["num_hidden_layers"])
    paths = []
    for name, own in (("few", modules[:HOT]), ("many", modules)):
        bank = write_bank(
            folder / name,
            name=name,
            backbone=backbone,
            modules=own,
            write_router=lambda path: save_router(path, settings, fitted=fitted),
            embed_backbone=False,
        )
        paths.append(folder / bank.name)
    itemsize = next(model.parameters()).itemsize
    sizes = [sum(size) for name, size in linear_layers(model).items() if name.endswith(CHANGED)]
    return Made(*paths, module_bytes=RANK * sum(sizes) * itemsize)


def _make_model(shape: dict[str, int]) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **shape,
        initializer_range=0.04,  # at the default 0.02, outputs soon repeat one token
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _make_tokenizer(vocabulary: int) -> Any:
    """A word a token, so that prompts have as many tokens as words."""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # type: ignore[call-arg, unused-ignore]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def _write_modules(model: Any, folder: Path, count: int) -> Iterator[BankModule]:
    layers = {n: size for n, size in linear_layers(model).items() if n.endswith(CHANGED)}
    for index in track(range(count), "writing modules", console=Console(stderr=True)):
        generator = torch.Generator().manual_seed(index)

        def factor(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * 0.05

        deltas = {n: LowRank(factor(o, RANK), factor(RANK, i)) for n, (o, i) in layers.items()}
        Module(module_name(index), deltas).save(folder / module_name(index))
        yield BankModule(module_name(index), folder / module_name(index))


def _fit_router(backbone: Backbone, layers: int) -> tuple[LearnedSettings, Any]:
    """Of the default signal, on prompts of each module's own words."""
    signal = SignalSettings().settled(layers)
    names = tuple(module_name(index) for index in range(HOT))
    settings = LearnedSettings(modules=names, signal=signal, backbone=backbone.digest)
    content = random.Random(0)
    with TorchEngine.load(backbone.path, dtype="float32") as engine:

        def labelled(module: int | None) -> Labelled:
            text = make_prompt(content, 32, module)
            name = None if module is None else module_name(module)
            return Labelled(Query.of(tuple(engine.tokenizer(text)["input_ids"]), text), name)

        examples = [labelled(index) for index in range(HOT) for _ in range(_FITTED_PER_MODULE)]
        examples += [labelled(None) for _ in range(_NONE_PROMPTS)]
        read = signal_of(signal, encode=engine.encode)
        return settings, fit("prototype", read, examples, modules=names)


def open_bank(path: Path) -> Bank:
    """Without reading every file again."""
    return Bank.open(path, verify=False)
