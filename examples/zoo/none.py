"""Prompts that no module serves, which the router learns to leave to the backbone."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random

from .tasks import draw_capitals, draw_date, draw_number, draw_record, draw_word, split_of

NONE_PROMPTS = 24
"""Of each kind."""

_DRAWS: dict[str, Callable[[Random], str]] = {
    "word": draw_word,
    "number": draw_number,
    "date": draw_date,
    "record": draw_record,
    "capitals": draw_capitals,
}


def none_prompts(count: int = NONE_PROMPTS, *, every: int = 1) -> list[str]:
    """Draw different prompts of every kind, on training inputs; the same on every call.

    count: of a kind; one that takes no input gives all it has. every: so many-th kind alone.
    """
    kinds = tomllib.loads((Path(__file__).parent / "none.toml").read_text("utf-8"))
    found: dict[str, None] = {}
    for name, kind in [*kinds.items()][::every]:
        random, wordings = Random(f"none {name}"), kind["wordings"]
        draw = _DRAWS.get(kind["input"])
        drawn: dict[str, None] = {}
        for k in range(3 * count if draw else len(wordings)):
            if draw is None or len(drawn) < count:
                drawn[_filled(wordings[k % len(wordings)], random, draw)] = None
        found |= drawn
    return list(found)


def _filled(wording: str, random: Random, draw: Callable[[Random], str] | None) -> str:
    """The wording with an input of its own at every {}."""
    while draw and "{}" in wording:
        text = draw(random)
        while split_of(text) != "train":
            text = draw(random)
        wording = wording.replace("{}", text, 1)
    return wording
