"""From scores to weights: small steps that are composed with `|`.

`softmax(0.5) | top_p(0.9, k_max=3) | abstain(0.005) | quantise` reads: turn scores into shares at
temperature 0.5, keep the best modules up to nine tenths, three at most, give up when the prompt is
farther away than all but 0.5 % of the modules' own prompts, snap to 1/64.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..adapters.errors import RouterError
from .policy_steps import (
    Abstain,
    Quantise,
    Sharpen,
    Softmax,
    Step,
    Threshold,
    TopK,
    TopP,
    Weighing,
)

STEPS: dict[str, type[Any]] = {
    "softmax": Softmax,
    "sharpen": Sharpen,
    "top_k": TopK,
    "top_p": TopP,
    "threshold": Threshold,
    "abstain": Abstain,
    "quantise": Quantise,
}
_STEP = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?:\((?P<arguments>[^()]*)\))?\s*")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Policy:
    """Steps in order."""

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read `softmax(0.5) | top_p(0.9, k_max=3) | quantise`; `str(policy)` writes it.

        Raises:
            RouterError: a step is unknown, an argument is unknown, missing or out of range, or a
                step that needs shares comes without one softmax as the first step.
        """
        steps = tuple(_parse_step(part) for part in text.split("|"))
        kinds = [type(step) for step in steps]
        needs_shares = any(kind is not Quantise for kind in kinds)
        if needs_shares and (kinds[0] is not Softmax or kinds.count(Softmax) > 1):
            raise RouterError(f"policy {text!r} needs one softmax, and as its first step")
        return cls(steps)

    def __str__(self) -> str:
        return " | ".join(map(_step_text, self.steps))

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after all steps."""
        for step in self.steps:
            weighing = step.apply(weighing)
        return weighing


def _parse_step(text: str) -> Step:
    match = _STEP.fullmatch(text)
    if match is None or match["name"] not in STEPS:
        raise RouterError(
            f"policy step {text.strip()!r} is unknown: {', '.join(STEPS)} are allowed"
        )
    kind = STEPS[match["name"]]
    try:
        step: Step = kind(**_arguments(match["arguments"] or "", kind))
    except ValueError as error:
        names = ", ".join(field.name for field in fields(kind)) or "no arguments"
        raise RouterError(
            f"policy step {text.strip()!r} cannot be read: {error}; {match['name']} takes {names}"
        ) from error
    return step


def _arguments(text: str, kind: type[Any]) -> dict[str, float | bool]:
    """The step's arguments by name, given by position or by name."""
    allowed = {field.name: field for field in fields(kind)}
    names = list(allowed)
    found: dict[str, float | bool] = {}
    for position, part in enumerate(text.split(",") if text.strip() else ()):
        name, equals, word = (piece.strip() for piece in part.rpartition("="))
        if not equals and position < len(names):
            name = names[position]
        if name not in allowed or name in found:
            raise ValueError(f"argument {part.strip()!r} is one too many")
        found[name] = _truth(word) if allowed[name].type == "bool" else _number(word)
    for name in allowed.keys() - found.keys():
        if allowed[name].default is MISSING:
            raise ValueError(f"{name} is missing")
    return found


def _truth(word: str) -> bool:
    if word not in ("true", "false"):
        raise ValueError(f"{word!r} is neither true nor false")
    return word == "true"


def _number(word: str) -> float:
    """Whole ones as int: a count may not be anything else."""
    if not _NUMBER.fullmatch(word):  # float() also takes nan, other scripts' digits and '_'
        raise ValueError(f"{word!r} is no number")
    value = float(word)
    return int(value) if value.is_integer() else value


def _step_text(step: Step) -> str:
    """As `parse` reads it: the first argument by position, others by name where not the default."""
    name, kind = next(pair for pair in STEPS.items() if pair[1] is type(step))
    shown = []
    for position, field in enumerate(fields(kind)):
        value = getattr(step, field.name)
        if position == 0:
            shown.append(_value_text(value))
        elif value != field.default:
            shown.append(f"{field.name}={_value_text(value)}")
    return f"{name}({', '.join(shown)})" if shown else name


def _value_text(value: float | bool) -> str:
    return str(value).lower().removesuffix(".0")
