"""Limits of what a request may ask for, whoever asks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """What a request may hold at most; the engine has limits of its own, on tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    body_bytes: int = Field(4 << 20, ge=1024, description="bytes of a JSON body")
    body_seconds: float = Field(30, gt=0, description="time for a body to arrive in")
    header_bytes: int = Field(32 << 10, ge=1024, description="bytes of request line and headers")
    header_seconds: float = Field(15, gt=0, description="time for request line and headers")
    connections: int | None = Field(
        4096, ge=1, description="open connections, beyond which requests get a 503; null: any"
    )
    prompts: int = Field(128, ge=1, le=128, description="prompts of one request")
    choices: int = Field(128, ge=1, le=128, description="choices of one request: prompts times n")
    stops: int = Field(16, ge=0, le=16, description="stop texts")
    messages: int = Field(4096, ge=1, description="messages of a conversation")
    prompt_characters: int = Field(
        1_000_000, ge=1, description="characters of a prompt, counted before it is tokenized"
    )
    samples: int = Field(1000, ge=0, le=1000, description="prompts that a module is introduced by")
    module_rank: int = Field(512, ge=1, description="rank of a module loaded at run time")
    module_bytes: int = Field(4 << 30, ge=1024, description="bytes of all its files")
    module_tensors: int = Field(20_000, ge=1, description="tensors of each of its files")


DEFAULT_LIMITS = Limits()
