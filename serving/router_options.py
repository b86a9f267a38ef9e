"""What router is fitted, and how it is said on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from ..adapters.errors import RouterError
from ..routers.policies import Policy
from ..routers.rules import Rule, Rules
from ..routers.settings import (
    DEFAULT_POLICY,
    EnsembleSettings,
    LearnedSettings,
    RuleSettings,
    SignalSettings,
)
from ..routers.store import read_settings

ScorerName = Literal["prototype", "mlp", "retriever"]


@dataclass(frozen=True)
class FitOptions:
    """What router is fitted.

    signal: None takes the usual one. rules: asked before what is learned. with_curve: also measure
    accuracy by number of samples, which takes many fits. name: of the new bank; None keeps the
    old one's. force: replace the bank that stands at the new one's place.
    """

    scorer: ScorerName = "prototype"
    signal: SignalSettings | None = None
    policy: str = DEFAULT_POLICY
    rules: tuple[RuleSettings, ...] = ()
    with_curve: bool = False
    name: str | None = None
    force: bool = False

    def check(self, modules: list[str]) -> None:
        """Look at everything that is said before prompts are read.

        Raises:
            RouterError: the policy or a rule cannot be read, or a rule names no module.
        """
        Policy.parse(self.policy)
        if unknown := set(as_rules(self.rules).modules) - set(modules):
            raise RouterError(
                f"a rule names {min(unknown)!r}, which is no module: {', '.join(modules)}"
            )

    def with_signal(self, usual: SignalSettings, *, layers: int) -> FitOptions:
        """The same with the signal settled. layers: how many the backbone has."""
        return replace(self, signal=(self.signal or usual).settled(layers))

    @property
    def reads_text_alone(self) -> bool:
        """Whether a description, which is no rendered prompt, can be read as prompts are."""
        return self.signal is not None and not self.signal.layers


def usual_signal(router: Path | None) -> SignalSettings:
    """What the router in a folder reads, if it was fitted; else the default."""
    try:
        settings = read_settings(router) if router else None
    except RouterError:  # it is about to be replaced
        return SignalSettings()
    members = settings.members if isinstance(settings, EnsembleSettings) else (settings,)
    return next((m.signal for m in members if isinstance(m, LearnedSettings)), SignalSettings())


def parse_signal(text: str, usual: SignalSettings) -> SignalSettings:
    """Read `layer=3,pooling=last,ngrams=256`; what is not named is as usual. Several layers are
    joined by `+`; `none` stands for no layer, no embedding, no recency.

    Raises:
        RouterError: a key is unknown or given twice, or a value out of range.
    """
    stated: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in SignalSettings.model_fields or not (equals and value):
            keys = ", ".join(SignalSettings.model_fields)
            raise RouterError(f"signal {part.strip()!r} is not KEY=VALUE with a key of {keys}")
        if key in stated:
            raise RouterError(f"signal {key} is given twice: give it once")
        stated[key] = _signal_value(key, value)
    try:
        return SignalSettings.model_validate({**usual.model_dump(), **stated})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        detail = f"{where} {stated.get(where)!r}: {message}" if where else message
        raise RouterError(f"signal {text!r} cannot be read: {detail}") from error


def read_rules(path: Path) -> tuple[RuleSettings, ...]:
    """Rules in YAML: a list, in order.

    Raises:
        RouterError: the file cannot be read, or a rule is none.
    """
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RouterError(f"{path} cannot be read: {_unread(error)}") from error
    if not (isinstance(document, list) and document):
        raise RouterError(f"{path} holds no list of rules: write '- {{module: a, keyword: b}}'")
    try:
        rules = TypeAdapter(tuple[RuleSettings, ...]).validate_python(document)
        as_rules(rules)
    except ValidationError as error:
        raise RouterError(f"{path}: {_no_rule(error)}") from error
    except RouterError as error:
        raise RouterError(f"{path}: {error}") from error
    return rules


def as_rules(rules: Sequence[RuleSettings]) -> Rules:
    """The scorer of some rules.

    Raises:
        RouterError: one cannot be used.
    """
    return Rules(tuple(Rule(**rule.model_dump()) for rule in rules))


def _unread(error: Exception) -> str:
    """Why a file cannot be read, in one line."""
    match error:
        case OSError():
            return str(error.strerror)
        case UnicodeDecodeError():
            return "it is not UTF-8: convert it"
        case RecursionError():
            return "it is nested too deeply"
        case yaml.MarkedYAMLError(problem_mark=yaml.Mark() as mark):
            return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _no_rule(error: ValidationError) -> str:
    """Number of the first rule at fault, what of it, and the remedy."""
    first = error.errors()[0]
    number, *where = first["loc"]
    rule, keys = f"rule {int(number) + 1}", ", ".join(RuleSettings.model_fields)
    if not where:
        return f"{rule} is {first['input']!r}: write {{module: a, keyword: b}}"
    if first["type"] == "extra_forbidden":
        return f"{rule}: the key {where[0]!r} is unknown: {keys} are known"
    place = ".".join(str(part) for part in where if part != "str")
    return f"{rule}: {place} is {first['input']!r}: {first['msg']}"


def _signal_value(key: str, value: str) -> object:
    if value == "none":
        return () if key == "layer" else 0 if key == "ngrams" else None
    if key == "layer":
        layers = value.split("+")
        return layers[0] if len(layers) == 1 else tuple(layers)
    return value
