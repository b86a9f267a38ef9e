"""What all request bodies are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    """What every body, and every part of one, has: no field that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_AT_ONCE = Field(fail_fast=True)
_Ids = Annotated[list[int], _AT_ONCE]
Prompts = str | _Ids | Annotated[list[str], _AT_ONCE] | Annotated[list[_Ids], _AT_ONCE]
"""A long list that is wrong is wrong at its first item: a million errors would take seconds."""


def one_by_one(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Each text, or its token ids, of `Prompts`."""
    if isinstance(given, str):
        return [given]
    token_ids = [item for item in given if isinstance(item, int)]
    return [token_ids] if token_ids else [item for item in given if not isinstance(item, int)]
