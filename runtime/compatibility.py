"""Putting our attention into a model, and the proof that it then computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters.errors import UnsupportedModelError
from .attention import ATTENTION_NAME, KVCache, PackedBatch, Span, packed, register


def prepare_model(model: Any) -> None:  # noqa: ANN401
    """Put our attention into a model, after checking that it then computes the same.

    Raises:
        UnsupportedModelError: it keeps a state beside keys and values, or masks in its own way.
    """
    text_config = model.config.get_text_config()
    if getattr(text_config, "attention_chunk_size", None):
        raise UnsupportedModelError("chunked attention is not supported: choose another backbone")
    register()
    reason = "its attention does not go through transformers' attention interface"
    try:
        expected = _reference_logits(model)
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(reason)
        difference = (_chunked_logits(model) - expected).abs().max() / expected.abs().max()
    except (ValueError, TypeError, AssertionError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be served by the torch engine: {error}"
        ) from error
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits in a packed batch (relative difference "
            f"{float(difference):.2g}, allowed {tolerance:g}): choose another backbone"
        )


def _probe_ids(model: Any) -> Tensor:  # noqa: ANN401
    size = min(24, model.config.get_text_config().max_position_embeddings)
    vocabulary = model.config.get_text_config().vocab_size
    ids: Tensor = (torch.arange(size, device=model.device) * 7919 + 13)[None] % vocabulary
    return ids


@torch.inference_mode()
def _reference_logits(model: Any) -> Tensor:  # noqa: ANN401
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=_probe_ids(model), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def _chunked_logits(model: Any) -> Tensor:  # noqa: ANN401
    """The same logits through a slot cache, the probe in two chunks beside a neighbour."""
    ids = _probe_ids(model)[0]
    half, whole = len(ids) // 2, len(ids)
    cache = KVCache(2, whole)
    first = PackedBatch(
        [Span(0, 0, half, 0), Span(1, half, half + whole, 0)], device=model.device, cache=cache
    )
    second = PackedBatch([Span(0, 0, whole - half, half)], device=model.device, cache=cache)
    parts = []
    for batch, tokens in ((first, torch.cat([ids[:half], ids])), (second, ids[half:])):
        with packed(batch):
            out = model(input_ids=tokens[None], position_ids=batch.positions[None], use_cache=False)
        parts.append(out.logits[0, : batch.spans[0].stop].float())
    return torch.cat(parts)
