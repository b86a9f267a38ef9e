"""What a prompt's text says, without a model: hashed n-grams of bytes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .base import Query
from .signals import shortened

_LENGTHS = (2, 3)
_MOST_CHARACTERS = 1024
"""Of a longer text the beginning and the end are read."""


@dataclass(frozen=True)
class Ngrams:
    """Counts of a text's runs of two and three bytes, hashed into a vector of length 1.

    The text is in UTF-8, with a space before and after it: a byte is a character in English, and
    elsewhere a part of one. Letter case and the values of digits do not count, so that prompts
    which differ in their input look alike. Hidden states tell what is asked for; n-grams tell a
    prompt of another task that happens to look alike there.

    size: of the vector, at least 1.

    Raises:
        RouterError: the size is below 1.

    Source: Weinberger et al. 2009, Feature Hashing for Large Scale Multitask Learning,
    arXiv:0902.2206, section 2 (signed hashes).
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RouterError(f"ngrams {self.size} is out of range: a size of at least 1")

    def read(self, queries: Sequence[Query]) -> Tensor:
        """The last turns' vectors, [n, size]; zeros where hashes of opposite signs cancel out."""
        return torch.stack([self._vector(query.text) for query in queries])

    def _vector(self, text: str) -> Tensor:
        counts = [0.0] * self.size
        masked = re.sub(r"\d", "0", shortened(text, _MOST_CHARACTERS).lower())
        data = f" {masked} ".encode("utf-8", "surrogatepass")
        for length in _LENGTHS:
            for start in range(len(data) - length + 1):
                code = zlib.crc32(data[start : start + length])
                counts[code % self.size] += 1.0 if code >> 16 & 1 else -1.0
        vector = torch.tensor(counts)
        unit: Tensor = vector / vector.norm().clamp_min(1e-9)
        return unit
