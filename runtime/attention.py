"""Slot KV cache, and the attention over a packed batch that is registered with transformers.

A packed batch is one row of tokens, [1, t], in which each sequence owns a span. The model is called
as it stands; only its attention is ours, through transformers' public AttentionInterface.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..adapters.errors import UnsupportedModelError

ATTENTION_NAME = "mergeroute"


@dataclass(frozen=True)
class Span:
    """Rows start:stop of the batch belong to one sequence, of which `past` tokens are cached."""

    slot: int
    start: int
    stop: int
    past: int


class KVCache:
    """Keys and values by slot: per layer [slots, heads, max_length, head_size], made at first use,
    since only the model knows how many heads of which size a layer has.
    """

    def __init__(self, slots: int, max_length: int) -> None:
        self.slots = slots
        self.max_length = max_length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's cache; the new keys and values [1, heads, t, size] tell its shape."""
        if index not in self._layers:
            self._layers[index] = (self._empty_like(keys), self._empty_like(values))
        return self._layers[index]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for pair in self._layers.values():
            for cache in pair:
                cache[target, :, :length] = cache[source, :, :length]

    def _empty_like(self, new: Tensor) -> Tensor:
        return new.new_empty(self.slots, new.shape[1], self.max_length, new.shape[3])


class PackedBatch:
    """The spans of one forward, and the cache they use; without a cache, each stands alone."""

    def __init__(
        self, spans: Sequence[Span], *, device: torch.device, cache: KVCache | None = None
    ) -> None:
        self.spans = spans
        self.cache = cache
        positions = [p for s in spans for p in range(s.past, s.past + s.stop - s.start)]
        self.positions = torch.tensor(positions, device=device)
        self._slots = torch.tensor(
            [s.slot for s in spans for _ in range(s.stop - s.start)], device=device
        )

    def keys_and_values(
        self, layer: int, keys: Tensor, values: Tensor
    ) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """Store the new keys and values, then give each span all there are, [heads, n, size]."""
        if self.cache is None:
            for span in self.spans:
                yield span, keys[0, :, span.start : span.stop], values[0, :, span.start : span.stop]
            return
        key_cache, value_cache = self.cache.layer(layer, keys, values)
        key_cache[self._slots, :, self.positions] = keys[0].transpose(0, 1)
        value_cache[self._slots, :, self.positions] = values[0].transpose(0, 1)
        for span in self.spans:
            length = span.past + span.stop - span.start
            yield span, key_cache[span.slot, :, :length], value_cache[span.slot, :, :length]


class _Current(threading.local):
    batch: PackedBatch | None = None


_current = _Current()


@contextmanager
def packed(batch: PackedBatch) -> Iterator[None]:
    """Attention that this thread runs in the block is over `batch`."""
    _current.batch = batch
    try:
        yield
    finally:
        _current.batch = None


def packed_attention(
    module: Any,  # noqa: ANN401 - transformers' attention layers share no type
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention of every span over its own past; the signature is transformers'.

    query [1, H, t, d], key and value [1, h, t, d] with H a multiple of h; returns [1, t, H, d].
    """
    if others.get("s_aux") is not None:
        raise UnsupportedModelError("attention sinks are not supported: choose another backbone")
    assert _current.batch is not None, "attention was called outside packed()"
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    new = _current.batch.keys_and_values(module.layer_idx, key, value)
    for span, keys, values in new:
        oldest = max(0, span.past + 1 - sliding_window) if sliding_window else 0
        q = query[0, :, span.start : span.stop]
        k, v = keys[:, oldest:], values[:, oldest:]
        mask = _mask(q, k, window=sliding_window)
        if softcap:
            attended = _attend_capped(q, k, v, mask=mask, scaling=scaling, softcap=softcap)
        else:
            attended = _attend(q, k, v, mask=mask, scaling=scaling)
        out[0, span.start : span.stop] = attended.transpose(0, 1)
    return out, None


def _mask(q: Tensor, k: Tensor, *, window: int | None) -> Tensor | None:
    """Where the last n of m positions may look: True in [n, m]; None when plain causal order says
    it all (one query, or a whole sequence within the window).
    """
    count, total = q.shape[1], k.shape[1]
    if count == 1 or (count == total and (not window or total <= window)):
        return None
    offset = total - count
    mask = torch.ones(count, total, dtype=torch.bool, device=q.device).tril(offset)
    return mask.triu(offset - window + 1) if window else mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """q [H, n, d], k and v [h, m, d] to [H, n, d]."""
    heads, count, size = q.shape
    if count == 1:  # the queries that share a key head stand as rows of one product
        grouped = q.reshape(1, k.shape[0], heads // k.shape[0], size)
        attended = F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scaling)
        return attended.reshape(heads, 1, v.shape[2])
    return F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=heads != k.shape[0],
    )[0]


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """As `_attend`, with scores squashed into ±softcap (Gemma 2)."""
    heads, count, size = q.shape
    grouped = q.reshape(k.shape[0], -1, size)  # [h, H/h * n, d]
    scores = grouped @ k.transpose(1, 2) * (scaling if scaling is not None else size**-0.5)
    scores = ((scores / softcap).tanh() * softcap).view(heads, count, -1)
    if mask is None and count > 1:
        mask = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights.view(k.shape[0], -1, k.shape[1]) @ v).view(heads, count, -1)


def register() -> None:
    """Make the attention known to transformers, with no mask: spans bring their own."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)
