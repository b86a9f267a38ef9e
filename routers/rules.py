"""Rules scorer: for what must be certain."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import re2

from ..adapters.blend import Blend
from ..adapters.errors import BlendError, RouterError
from .base import Card, Query, Scores, Signal

SECRET_HEADERS = frozenset(
    ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key")
)
"""Names of headers that are never labels, so that no decision tells a secret."""

Condition = Callable[[Query], str | None]
"""What of a query meets the condition, in words; None: nothing does."""


@dataclass(frozen=True)
class Rule:
    """Where prompts go that meet every condition given; at least one is.

    module: what serves them; None: the backbone.
    keyword: words or phrases of which one stands in the last turn as whole words, in any letter
    case. Scripts without spaces between words have no whole words: use a regex there.
    regex: found somewhere in the last turn. In RE2's syntax, which takes time linear in the text
    whatever the pattern; it has no look-around and no back-references, and \\b, \\w, \\d and \\s
    know ASCII only (\\pL is any letter). `(?i)` in front ignores letter case.
    metadata, header: a value or several to choose from, by key of the request's metadata and by
    name of its header (in any letter case; none of SECRET_HEADERS); values are compared exactly.
    """

    module: str | None
    keyword: str | Collection[str] | None = None
    regex: str | None = None
    metadata: Mapping[str, str | Collection[str]] = field(default_factory=dict)
    header: Mapping[str, str | Collection[str]] = field(default_factory=dict)

    def found(self, query: Query) -> str | None:
        """What meets the conditions, in words; None: not all are met."""
        parts = []
        for condition in self.conditions:
            if (part := condition(query)) is None:
                return None
            parts.append(part)
        return ", ".join(parts)

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """All that must hold.

        Raises:
            RouterError: there is none, or one cannot be read.
        """
        conditions = []
        if self.keyword is not None:
            conditions.append(_keyword(_several("keyword", self.keyword)))
        if self.regex is not None:
            conditions.append(_regex(self.regex))
        labels = {f"metadata {key}": (key, values) for key, values in self.metadata.items()}
        for name, values in self.header.items():
            if name.lower() in SECRET_HEADERS:
                raise RouterError(f"header {name.lower()} holds a secret, which no rule sees")
            labels[f"header {name.lower()}"] = (f"header:{name.lower()}", values)
        for shown, (key, values) in labels.items():
            conditions.append(_label(shown, key, _several(shown, values)))
        if not conditions:
            raise RouterError("it has no condition: give keyword, regex, metadata or header")
        return tuple(conditions)

    def check(self) -> None:
        """Look at everything a rule says before a query comes.

        Raises:
            RouterError: a condition cannot be read, there is none, or the module has no name.
        """
        assert self.conditions
        try:
            Blend({} if self.module is None else {self.module: 1.0})
        except BlendError as error:
            raise RouterError(str(error)) from error


@dataclass(frozen=True)
class Rules:
    """The first rule that matches decides, for certain; without a match there is no opinion.

    unserved: modules whose rules do not count, because nothing serves them now.

    Raises:
        RouterError: a rule cannot be read; the message has its number, from 1.
    """

    rules: tuple[Rule, ...]
    unserved: frozenset[str] = frozenset()
    name: str = "rules"

    def __post_init__(self) -> None:
        for number, rule in enumerate(self.rules, 1):
            try:
                rule.check()
            except RouterError as error:
                raise RouterError(f"rule {number} cannot be used: {error}") from error

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that rules name and something serves."""
        named = dict.fromkeys(rule.module for rule in self.rules if rule.module is not None)
        return tuple(name for name in named if name not in self.unserved)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Nothing is read that needs computing."""
        return ()

    def score(self, query: Query) -> Scores | None:
        """Weight 1 for the module of the first rule that matches; empty: it says the backbone."""
        for number, rule in enumerate(self.rules, 1):
            if rule.module in self.unserved or (found := rule.found(query)) is None:
                continue
            logits = {} if rule.module is None else {rule.module: 1.0}
            return Scores(logits, is_certain=True, reason=f"rule {number} ({found}) matches")
        return None

    def with_module(self, card: Card) -> Rules:
        """The rules that name the module count, if there are any."""
        return replace(self, unserved=self.unserved - {card.name})

    def without_module(self, name: str) -> Rules:
        """The rules that name the module do not count; the others keep their numbers."""
        return replace(self, unserved=self.unserved | {name})


def _several(shown: str, given: str | Collection[str]) -> tuple[str, ...]:
    """One or several values as a tuple; a text is one value, not its letters."""
    values = (given,) if isinstance(given, str) else tuple(given)
    if not values:
        raise RouterError(f"{shown} has no value: give at least one")
    return values


def _keyword(phrases: tuple[str, ...]) -> Condition:
    if not all(phrase.split() for phrase in phrases):
        raise RouterError("a keyword is empty: give a word")
    spaced = (r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases)
    # literals only: no pattern of a user's, so the standard library takes linear time
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)", re.IGNORECASE)

    def found(query: Query) -> str | None:
        match = pattern.search(query.text)
        return match and f"keyword {' '.join(match[0].split())!r}"

    return found


def _regex(text: str) -> Condition:
    options = re2.Options()
    options.log_errors = False
    try:
        pattern = re2.compile(text, options)
    except (re2.error, UnicodeEncodeError) as error:
        raise RouterError(
            f"regex {text!r} is not in RE2's syntax ({_message(error)}): it has no look-around and "
            "no back-references"
        ) from error
    readable = f"regex {text!r}"
    return lambda query: readable if pattern.search(_encodable(query.text)) else None


def _label(shown: str, key: str, values: tuple[str, ...]) -> Condition:
    def found(query: Query) -> str | None:
        value = query.labels.get(key)
        return f"{shown} {value!r}" if value in values else None

    return found


def _encodable(text: str) -> str:
    """The text without lone surrogates, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def _message(error: Exception) -> str:
    """RE2 speaks in bytes."""
    reason = error.args[0] if error.args else error
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(error)
