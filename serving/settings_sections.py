"""The parts of serve.yaml that are small enough to have no other home."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ConversationSettings(BaseModel):
    """How conversations are routed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: Literal["sticky", "each-turn"] = Field(
        "sticky", description="keep the blend, or let the last turn alone decide"
    )
    margin: float = Field(
        0.5, ge=0, le=1, description="by how much another module must lead to move a conversation"
    )
    patience: int = Field(
        2, ge=1, description="turns in a row that are no module's until the backbone answers"
    )
    sessions: int = Field(10_000, ge=0, description="most conversations remembered by their id")
    idle_minutes: float = Field(60, gt=0, description="how long an unused one is remembered")


class ModuleSourceSettings(BaseModel):
    """Where modules may come from at run time, beside the module roots."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    hub: bool = Field(False, description="whether lora_path may be a hub id: org/name or @revision")
    uploads: bool = Field(False, description="whether clients may send modules")
