"""Names of blends: what a request's LoRA name says, and how it is read back inside vLLM.

A name holds the modules' digests, not their names: it is a part of the key of vLLM's prefix cache,
so that a module that was replaced never finds keys and values of the one before.
"""

from __future__ import annotations

import re

from ...adapters.blend import Blend
from ...adapters.errors import BlendError

KEY_DIGITS = 32
"""Hexadecimal digits of a digest that name a module: 128 bits."""

VIRTUAL_PATH = "virtual"
"""The path that blends have for vLLM: no place, but a part of its prefix cache's key."""

_PREFIX = "blend:"
_KEY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")


def module_key(digest: str) -> str:
    """A module's name inside vLLM, from its digest."""
    return digest.removeprefix("sha256:")[:KEY_DIGITS]


def is_key(text: str) -> bool:
    """Whether a text is a module's name inside vLLM; then it is a safe name of a folder too."""
    return _KEY.fullmatch(text) is not None


def lora_name(blend: Blend) -> str:
    """`blend:<key>=0.75,<key>=-0.25`: what the `model` field of a request to vLLM holds.

    blend: weights by module digest, at least one; the backbone alone goes by vLLM's own name.
    """
    return str(blend.renamed({digest: module_key(digest) for digest in blend}))


def is_blend(name: str | None) -> bool:
    """Whether a `model` field means to name a blend."""
    return name is not None and name.startswith(_PREFIX)


def read_name(name: str) -> Blend:
    """The weights by module key that a LoRA name holds.

    Raises:
        BlendError: it is no name that `lora_name` writes.
    """
    blend = Blend.parse(name)
    strange = [key for key in blend if not is_key(key)]
    if strange or not blend or str(blend) != name:
        raise BlendError(
            f"{name!r} is no blend: write blend:KEY=WEIGHT,... with keys of {KEY_DIGITS} "
            "lower-case hexadecimal digits in order and weights in 1/64, none of them 0"
        )
    return blend
