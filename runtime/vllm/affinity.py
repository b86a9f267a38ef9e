"""Affinity: requests with the same blend and the same beginning go where that is cached already, as
long as the replica there is not busier than its share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

_PREFIX_TOKENS = 128
"""Of a prompt: as long as a system prompt of a few sentences, which many conversations share."""

_SLACK = 1.25
"""Most requests of a replica, times the mean of all."""


def affinity_key(model: str, prompt_ids: Sequence[int]) -> bytes:
    """What requests share that find each other's prefix cached: vLLM keys it by the LoRA's name."""
    prefix = ",".join(map(str, prompt_ids[:_PREFIX_TOKENS]))
    return hashlib.sha256(f"{model}\0{prefix}".encode()).digest()


def preferred(key: bytes, in_flight: Mapping[str, int]) -> list[str]:
    """Names of replicas, the one to take first: by the key alone, but those whose share of the
    requests in flight is used up come last, the least busy of them first. A replica that comes or
    goes moves no other key.

    Source: Thaler and Ravishankar 1998, rendezvous hashing; Mirrokni et al. 2018, Consistent
    Hashing with Bounded Loads, arXiv:1608.01350.
    """
    most = math.ceil(_SLACK * (sum(in_flight.values()) + 1) / max(1, len(in_flight)))
    by_key = sorted(in_flight, key=lambda name: hashlib.sha256(key + name.encode()).digest())
    with_room = [name for name in by_key if in_flight[name] < most]
    return with_room + sorted(
        (name for name in by_key if in_flight[name] >= most), key=in_flight.__getitem__
    )
