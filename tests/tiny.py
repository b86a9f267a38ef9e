"""Tiny random models, modules and tokenizers, and the slow obvious reference for exactness."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mergeroute.adapters.backbone import linear_layers
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.merging import merge_into

VOCABULARY = 300
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 24}

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GROUPED),
    "qwen2": transformers.Qwen2Config(**_GROUPED),
    "qwen3": transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": transformers.MistralConfig(**_GROUPED, sliding_window=24),
    "gemma2": transformers.Gemma2Config(**_GEMMA, query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=8),
    "phi3": transformers.Phi3Config(**_GROUPED),
    "gpt_neox": transformers.GPTNeoXConfig(**_SIZES),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


def make_model(
    name: str = "llama", *, seed: int = 0, tied: bool | None = None, **sizes: Any
) -> Any:
    """A random float32 model whose greedy continuations vary.

    tied: whether head and embedding share one weight; None leaves it to the architecture.
    sizes: settings of the configuration that differ.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    config.update(sizes)
    if tied is not None:
        config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def make_module(
    model: Any, name: str, *, rank: int = 4, seed: int = 0, scale: float = 0.3
) -> Module:
    """A random module over all linear layers but the first layer's, so that coverage is partial."""
    generator = torch.Generator().manual_seed(seed * 7919 + 1)
    layers = dict(list(linear_layers(model).items())[1:])
    return Module(
        name,
        {
            layer: LowRank(
                torch.randn(o, rank, generator=generator) * scale,
                torch.randn(rank, i, generator=generator) * scale,
            )
            for layer, (o, i) in layers.items()
        },
    )


def make_rich_module(
    model: Any, name: str, *, rank: int = 4, seed: int = 0, ties_head: bool = True
) -> Module:
    """A random module over linear layers, embeddings, an untied head, norms and biases.

    ties_head: False changes a tied head too, in another way than the embedding.
    """
    generator = torch.Generator().manual_seed(seed * 104_729 + 7)
    shapes = Shapes.of(model)
    outer = {**shapes.embeddings, **shapes.head}
    if shapes.tied and ties_head:
        del outer[shapes.tied[1]]
    deltas = {
        layer: LowRank(
            torch.randn(o, rank + 1, generator=generator) * 0.1,
            torch.randn(rank + 1, i, generator=generator) * 0.1,
        )
        for layer, (o, i) in outer.items()
    }
    vectors = {n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes.vectors.items()}
    inner = make_module(model, name, rank=rank, seed=seed, scale=0.2).deltas
    return Module(
        name, {**inner, **deltas}, vectors, frozenset(shapes.embeddings), ties_head=ties_head
    )


def make_modules(model: Any, count: int, *, rank: int = 4) -> dict[str, Module]:
    """Modules m0, m1, ... with ranks that differ."""
    return {
        f"m{k}": make_module(model, f"m{k}", rank=rank + k % 3, seed=k + 1) for k in range(count)
    }


def make_prompt(length: int, *, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())


@torch.no_grad()
def reference_tokens(
    model: Any,
    modules: Mapping[str, Module],
    blend: Blend,
    prompt: Sequence[int],
    count: int,
) -> list[int]:
    """Greedy tokens of `generate` on a copy of the model that has the blend merged in.

    model: plain, never given to an engine.
    """
    merged = copy.deepcopy(model)
    merge_into(merged, modules, blend)
    out = merged.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def make_tokenizer() -> Any:
    """Byte-level, one token a byte, ids 0 to 255, with two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|user|>"]
    )
    fast.chat_template = (
        "{% for m in messages %}<|user|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    return fast
