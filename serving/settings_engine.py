"""The part of serve.yaml that says what runs the models."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:  # torch takes seconds to import, which --help need not
    from ..runtime.vllm.options import VllmOptions

API_KEY_VARIABLE = "MERGEROUTE_VLLM_API_KEY"
_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")


class EngineSettings(BaseModel):
    """What runs the models; all but kind is for vllm."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["torch", "vllm"] = Field(
        "torch", description="torch: in this process; vllm: in servers of their own"
    )
    urls: tuple[str, ...] = Field(
        (),
        description="vLLM servers that run already, all on the bank's backbone and on "
        "modules_folder; none: they are started here",
    )
    modules_folder: str | None = Field(
        None,
        description="with urls: the folder that the servers were started with "
        "(MERGEROUTE_VLLM_MODULES), which this gateway alone writes",
    )
    replicas: int = Field(1, ge=1, le=64, description="servers to start")
    devices: tuple[str, ...] = Field(
        (), description="CUDA_VISIBLE_DEVICES of each replica, as '0' or '0,1'"
    )
    command: str = Field("vllm", description="the program, by name or path")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="of `vllm serve`, as tensor_parallel_size: 2; true is the flag alone",
    )
    blending: Literal["virtual", "materialise", "auto"] = Field(
        "virtual",
        description="inside vLLM: virtual, on versions that were tested; materialise, slower, "
        "through its public interface; auto: whichever can be had",
    )
    module_slots: int | None = Field(
        None,
        ge=1,
        description="most modules in memory at once, the others are put in when they are asked "
        "for; null: all of the start and 8 more",
    )
    module_rank: int | None = Field(
        None, ge=1, description="largest rank of a module; null: that of the banks, at least 16"
    )
    start_seconds: float = Field(900, gt=0, description="until servers must be ready")
    first_token_seconds: float = Field(
        300, gt=0, description="until the first chunk of a stream must be here"
    )
    chunk_seconds: float = Field(120, gt=0, description="until the next one must be")
    answer_seconds: float = Field(
        1800, gt=0, description="until an answer that is not streamed must be here"
    )
    silent_seconds: float = Field(
        15,
        gt=0,
        description="how long a server may not answer GET /health until its requests are asked of "
        "another",
    )
    hung_seconds: float = Field(
        60, gt=0, description="how long it may not until it is started again"
    )
    logs: str | None = Field(
        None, description="folder of what servers print; null: one that goes with the gateway"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:  # noqa: ANN401 - before validation
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not _URL.fullmatch(value):
                raise ValueError(f"{value!r} is no URL: write http://host:port")
        if len(set(values)) < len(values):
            raise ValueError("a server is named twice: name each once")
        return values

    @model_validator(mode="after")
    def _goes_together(self) -> EngineSettings:
        fields = type(self).model_fields.items()
        stated = {
            n for n, f in fields if getattr(self, n) != f.get_default(call_default_factory=True)
        }
        said = stated - {"kind"}
        if self.kind == "torch" and said:
            raise ValueError(f"engine.{min(said)} is for the engine vllm: add kind: vllm")
        started = said & {"replicas", "devices", "command", "options", "blending", "logs"}
        if self.urls and started:
            raise ValueError(
                f"engine.{min(started)} is for servers that are started here, and engine.urls "
                "names others: leave one of the two out"
            )
        if bool(self.urls) != (self.modules_folder is not None):
            raise ValueError("engine.urls and engine.modules_folder go together: state both")
        return self

    @property
    def servers(self) -> VllmOptions | None:
        """Of vLLM; None: the models run in this process.

        Raises:
            EngineError: an option is not vLLM's, or ours to set.
        """
        if self.kind == "torch":
            return None
        from ..runtime.vllm.options import VllmOptions

        return VllmOptions(
            urls=self.urls,
            api_key=os.environ.get(API_KEY_VARIABLE),
            modules_folder=Path(self.modules_folder) if self.modules_folder else None,
            replicas=self.replicas,
            devices=self.devices,
            command=self.command,
            flags=self.options,
            mode=self.blending,
            slots=self.module_slots,
            rank=self.module_rank,
            start_s=self.start_seconds,
            first_s=self.first_token_seconds,
            next_s=self.chunk_seconds,
            whole_s=self.answer_seconds,
            silent_s=self.silent_seconds,
            hung_s=self.hung_seconds,
            log_folder=Path(self.logs) if self.logs else None,
        )


def merged(file: object, said: object) -> object:
    """The engine of a file and of the command line, which goes before it."""
    if not isinstance(said, dict):
        return said
    stated = {"kind": file} if isinstance(file, str) else file
    if not isinstance(stated, dict):
        return said
    if said.get("kind") not in (None, stated.get("kind", "torch")):
        return said
    options = {**(stated.get("options") or {}), **(said.get("options") or {})}
    return {**stated, **said, **({"options": options} if options else {})}
