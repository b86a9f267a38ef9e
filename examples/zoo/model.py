"""The zoo's model: its size, and how checkpoints and LoRA folders are read and written."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .tokenizer import build_tokenizer

MAX_TOKENS = 1024
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def new_base(*, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Make the untrained base model, float32, and its tokenizer."""
    tokenizer = build_tokenizer(max_length=MAX_TOKENS)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config), tokenizer


def load_model(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint; the stored bf16 weights are widened to float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(folder)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint with bf16 weights, which rounds the model in place."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_lora(model: LlamaForCausalLM, *, seed: int) -> PeftModel:
    """Put a fresh LoRA of rank 8 on every linear layer; only the LoRA is trainable."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def save_lora(adapted: PeftModel, folder: Path) -> None:
    """Write a PEFT LoRA folder with bf16 weights; equal weights give equal files."""
    adapted.peft_config["default"].base_model_name_or_path = "zoo-base"
    adapted.to(torch.bfloat16).save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"].sort()  # PEFT keeps a set, whose order varies
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_lora(base: Path, folder: Path) -> LlamaForCausalLM:
    """Load the base with a LoRA folded in, float32."""
    return PeftModel.from_pretrained(load_model(base), folder).merge_and_unload()
