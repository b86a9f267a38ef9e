"""The bodies that load and unload modules, in vLLM's words and some of our own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from ..schemas.body import Body

MAX_SAMPLES = 1000
_Sample = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class LoadModuleRequest(Body):
    """`POST /v1/load_lora_adapter`. lora_name: a bare name goes to the first bank."""

    lora_name: str = Field("", description="name, or bank:name")
    lora_path: str = Field("", description="folder under one of the server's module roots")
    load_inplace: bool = Field(False, description="replace the module that has this name")
    expected_generation: int | None = Field(
        None, ge=0, description="of what has the name now, 0: nothing; else 409"
    )
    base_model_name: str | None = Field(None, description="the backbone it must be loaded onto")
    pinned: bool = Field(False, description="it stays in memory")
    description: str | None = Field(None, max_length=4096, description="what it is for")
    samples: tuple[_Sample, ...] = Field((), max_length=MAX_SAMPLES, description="its prompts")


class UnloadModuleRequest(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str = Field("", description="name, or bank:name")
    lora_int_id: int | None = Field(None, description="vLLM's number of it; the name alone counts")
    expected_generation: int | None = Field(None, ge=0, description="else 409")
