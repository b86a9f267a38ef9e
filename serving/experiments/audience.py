"""Who takes part in an experiment, beside the share of traffic."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..access.callers import Caller, Scope

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_Test = Callable[[str], Any]


class Section(BaseModel):
    """What every part of an experiment has: no key that is not known, and no change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Audience(Section):
    """Who takes part: all that is stated must hold; nothing stated is everybody."""

    keys: tuple[str, ...] = Field((), description="names of API keys, of which it is one")
    scopes: tuple[Scope, ...] = Field((), description="scopes that the API key has, all of them")
    headers: dict[str, str] = Field(
        default_factory=dict,
        description="request headers by name: the value, or /PATTERN/ in RE2's syntax, which is "
        "found anywhere in it",
    )

    @field_validator("headers")
    @classmethod
    def _can_be_read(cls, headers: dict[str, str]) -> dict[str, str]:
        for value in headers.values():
            _test(value)
        named = {header_name(name): value for name, value in headers.items()}
        if len(named) < len(headers):
            raise ValueError("a header is named twice: letter case makes no difference")
        return named

    def admits(self, headers: Mapping[str, str], caller: Caller) -> bool:
        """Whether a request takes part. headers: by name in lower case."""
        if self.keys and caller.name not in self.keys:
            return False
        if not caller.scopes.issuperset(self.scopes):
            return False
        return all(
            (value := headers.get(name)) is not None and test(header_text(value))
            for name, test in self._tests.items()
        )

    @cached_property
    def _tests(self) -> dict[str, _Test]:
        return {name: _test(value) for name, value in self.headers.items()}


def header_name(name: str) -> str:
    """A header's name in lower case.

    Raises:
        ValueError: it is none, or that of one that holds secrets.
    """
    from ...routers.rules import SECRET_HEADERS  # imports torch, which --help need not

    if not _HEADER.fullmatch(name):
        raise ValueError(f"{name[:60]!r} is no name of a header: letters, digits and '-'")
    if name.lower() in SECRET_HEADERS:
        raise ValueError(f"the header {name.lower()!r} holds a secret: no experiment looks at it")
    return name.lower()


def header_text(value: str) -> str:
    """A header's value as its sender meant it: servers read UTF-8 as Latin-1."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _test(value: str) -> _Test:
    """Whether a header's value is the one stated, or matches its pattern.

    Raises:
        ValueError: the pattern is not in RE2's syntax.
    """
    if len(value) < 2 or not (value.startswith("/") and value.endswith("/")):
        return value.__eq__
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        found: _Test = re2.compile(value[1:-1], options).search
    except (re2.error, UnicodeEncodeError) as error:
        raise ValueError(
            f"the pattern {value!r} is not in RE2's syntax: it has no look-around and no "
            "back-references"
        ) from error
    return found
