"""serve.yaml: what `mergeroute serve` takes, in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..adapters.errors import MergerouteError

if TYPE_CHECKING:  # torch takes seconds to import, which --help need not
    from ..adapters.bank import Bank
    from .hosting import Placement, Report
    from .service import ServiceOptions

DEFAULT_PORT = 8000


class SettingsError(MergerouteError):
    """The settings are at fault."""


class UsageError(SettingsError):
    """The command line is at fault."""


class ConversationSettings(BaseModel):
    """How conversations are routed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["sticky", "each-turn"] = Field(
        "sticky", description="keep the blend, or let the last turn alone decide"
    )
    margin: float = Field(
        0.5, ge=0, le=1, description="by how much another module must lead to move a conversation"
    )
    sessions: int = Field(10_000, ge=0, description="most conversations remembered by their id")
    idle_minutes: float = Field(60, gt=0, description="how long an unused one is remembered")


class ServeSettings(BaseModel):
    """What is served, where and how. Paths in a file are relative to the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    banks: tuple[str, ...] = Field((), description="bank folders; the first is the default")
    backbone: str | None = Field(None, description="checkpoint folder or hub id, instead of a bank")
    modules: dict[str, str] = Field(default_factory=dict, description="LoRA folders by name")
    name: str = Field("adhoc", description="name of the bank made of backbone and modules")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="port; 0 takes a free one")
    engine: Literal["torch"] = Field("torch", description="what runs the model")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    max_length: int | None = Field(None, ge=2, description="most tokens of prompt and completion")
    max_concurrency: int = Field(16, ge=1, description="most requests that run at once")
    module_roots: tuple[str, ...] = Field(
        (".",), description="folders that modules may be loaded from at run time"
    )
    conversations: ConversationSettings = Field(
        ConversationSettings(), description="how conversations are routed"
    )
    log_format: Literal["text", "json"] = Field("text", description="form of the log lines")

    @model_validator(mode="after")
    def _serves_something(self) -> ServeSettings:
        if self.modules and not self.backbone:
            raise ValueError("modules need a backbone: name one")
        if not (self.banks or self.backbone):
            raise ValueError("name a bank, or a backbone with modules")
        return self

    @property
    def placement(self) -> Placement:
        """Where and how engines run."""
        from ..runtime.torch_engine import EngineOptions
        from .hosting import Placement

        options = EngineOptions(
            max_length=self.max_length,
            max_concurrency=self.max_concurrency,
            token_budget=max(512, self.max_concurrency),
        )
        return Placement(device=self.device, dtype=self.dtype, options=options)

    @property
    def service_options(self) -> ServiceOptions:
        """What the service does beside answering.

        Raises:
            SettingsError: a module root is no folder.
        """
        from ..routers.conversation import Stickiness
        from .service import ServiceOptions

        for root in self.module_roots:
            if not Path(root).is_dir():
                raise SettingsError(f"the module root {root} is no folder: name one that is there")
        said = self.conversations
        return ServiceOptions(
            stickiness=Stickiness(said.mode, said.margin),
            sessions=said.sessions,
            idle_s=said.idle_minutes * 60,
            module_roots=tuple(map(Path, self.module_roots)),
        )

    def open_banks(self, report: Report = lambda _: None) -> list[Bank]:
        """Open what is to be served; the bank made on the spot comes last.

        Raises:
            MergerouteError: something cannot be opened.
        """
        from ..adapters.backbone import Backbone
        from ..adapters.bank import Bank, BankModule

        banks = [Bank.open(path, progress=lambda f: report(f"verified {f}")) for path in self.banks]
        if self.backbone:
            modules = [BankModule(n, Path(path).resolve()) for n, path in self.modules.items()]
            banks.append(Bank.adhoc(self.name, Backbone.open(self.backbone), modules))
        names = [bank.name for bank in banks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingsError(f"two banks are called {min(twice)!r}: rename one, or leave it out")
        return banks


def read_settings(path: Path | None, overrides: Mapping[str, object]) -> ServeSettings:
    """Settings of a file, if there is one, with the command line's on top.

    Raises:
        SettingsError: the file cannot be read, or a value is not allowed.
    """
    values = _read_file(path) if path else {}
    values |= {key: value for key, value in overrides.items() if value not in (None, (), {})}
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        message = f"{where}: {message}" if where else message
        if path is None:
            raise UsageError(message) from error
        raise SettingsError(f"{path}: {message}") from error


def _read_file(path: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: write 'banks: [path/to/bank]'")
    for key in ("banks", "modules", "module_roots"):
        if key in values:
            values[key] = _beside(path, values[key])
    if (path.parent / str(values.get("backbone"))).exists():  # else a hub id
        values["backbone"] = _beside(path, values["backbone"])
    return values


def _beside(path: Path, value: object) -> object:
    """The paths in a value, relative ones beside the file."""
    if isinstance(value, list):
        return [_beside(path, item) for item in value]
    if isinstance(value, dict):
        return {key: _beside(path, item) for key, item in value.items()}
    return str(path.parent / value) if isinstance(value, str) else value
