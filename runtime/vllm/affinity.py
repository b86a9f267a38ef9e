"""Affinity: requests with the same blend and the same long beginning go where that is cached, as
long as the replica there is not busier than its share; all others to the least busy one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_PREFIX_TOKENS = 128
"""Of a prompt: as long as a system prompt of a few sentences, which many conversations share."""

_WORTH_TOKENS = 64
"""Of a prompt: below, to compute it again costs less than to wait behind others."""

_SLACK = 1.25
"""Most requests of a replica, times the mean of all."""


@dataclass(frozen=True)
class Affinity:
    """What a request shares with those that find its prefix cached. is_strong: whether that is
    worth more than a replica with fewer requests.
    """

    key: bytes
    is_strong: bool = True

    @classmethod
    def of(cls, model: str, prompt_ids: Sequence[int]) -> Affinity:
        """vLLM keys its cache by the LoRA's name."""
        prefix = ",".join(map(str, prompt_ids[:_PREFIX_TOKENS]))
        key = hashlib.sha256(f"{model}\0{prefix}".encode()).digest()
        return cls(key, len(prompt_ids) >= _WORTH_TOKENS)


def preferred(affinity: Affinity, in_flight: Mapping[str, int]) -> list[str]:
    """Names of replicas, the one to take first: by the key alone, but those whose share of the
    requests in flight is used up come last, the least busy of them first. A replica that comes or
    goes moves no other key. Where the affinity is weak the key decides between equals alone.

    Source: Thaler and Ravishankar 1998, rendezvous hashing; Mirrokni et al. 2018, Consistent
    Hashing with Bounded Loads, arXiv:1608.01350.
    """
    key = affinity.key
    most = math.ceil(_SLACK * (sum(in_flight.values()) + 1) / max(1, len(in_flight)))
    by_key = sorted(in_flight, key=lambda name: hashlib.sha256(key + name.encode()).digest())
    if not affinity.is_strong:
        return sorted(by_key, key=in_flight.__getitem__)
    with_room = [name for name in by_key if in_flight[name] < most]
    return with_room + sorted(
        (name for name in by_key if in_flight[name] >= most), key=in_flight.__getitem__
    )
