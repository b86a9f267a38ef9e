"""serve.yaml: what `mergeroute serve` takes, in a file."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from .access.limits import DEFAULT_LIMITS, Limits
from .errors import SettingsError
from .experiments.definition import Experiment
from .pressure import DEFAULT_PRESSURE, Pressure
from .settings_engine import EngineSettings
from .settings_sections import ConversationSettings, ModuleSourceSettings

if TYPE_CHECKING:  # torch takes seconds to import, which --help need not
    from ..adapters.bank import Bank
    from .access.guard import Policy
    from .experiments.live import LiveExperiments
    from .hosting import Placement, Report
    from .modules.state import StateFolder
    from .service import ServiceOptions
    from .telemetry.options import Telemetry
    from .telemetry.traces import Traces

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
NO_STATE = "none"
_ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)
"""As browsers send it: in lower case, and without the port that the scheme has anyway."""


class ServeSettings(BaseModel):
    """What is served, where and how. Paths in a file are relative to the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    banks: tuple[str, ...] = Field((), description="bank folders; the first is the default")
    backbone: str | None = Field(
        None, description="checkpoint folder or hub id, served as one more bank"
    )
    modules: dict[str, str] = Field(default_factory=dict, description="LoRA folders by name")
    name: str = Field("adhoc", description="name of the bank made of backbone and modules")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="port; 0 takes a free one")
    engine: EngineSettings = Field(
        EngineSettings(), description="what runs the models: torch, vllm, or keys with values"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    max_length: int | None = Field(
        None,
        ge=2,
        description="most tokens of prompt and completion; null: as many as the backbone was "
        "trained for, at most 4096",
    )
    max_concurrency: int = Field(16, ge=1, description="most requests that run at once")
    module_roots: tuple[str, ...] = Field(
        (".",), description="folders that modules may be loaded from at run time"
    )
    module_memory: int | None = Field(
        None,
        description="most memory of the modules of each backbone, in bytes or as 2GB: those asked "
        "for last stay in it, the others are read from disk when they are asked for; null: all "
        "stay",
    )
    pinned_modules: tuple[str, ...] = Field(
        (), description="modules that always stay in memory: NAME or BANK:NAME"
    )
    prefetch_modules: tuple[str, ...] | Literal["all"] = Field(
        "all", description="modules that are read into memory at the start, while there is room"
    )
    module_sources: ModuleSourceSettings = Field(
        ModuleSourceSettings(), description="where else modules may come from at run time"
    )
    state: str | None = Field(
        None,
        description="folder that loads and unloads are kept in, for a restart; none: nowhere. "
        "null: ~/.local/state/mergeroute/PORT, or nowhere where the port is 0",
    )
    database: str | None = Field(
        None,
        description="SQLAlchemy URL of the database of experiments, which several servers may "
        "share; null: a SQLite file in the state folder",
    )
    experiments: tuple[Experiment, ...] = Field(
        (), description="experiments that are made and started, as POST /v1/experiments takes them"
    )
    conversations: ConversationSettings = Field(
        ConversationSettings(), description="how conversations are routed"
    )
    api_keys: str | None = Field(None, description="file of API keys; null: everybody may ask")
    cors_origins: tuple[str, ...] = Field(
        (), description="origins whose pages may call the server from a browser; ['*']: all"
    )
    limits: Limits = Field(DEFAULT_LIMITS, description="what a request may hold at most")
    pressure: Pressure = Field(DEFAULT_PRESSURE, description="how long things may take")
    tool_parser: Literal["auto", "hermes", "llama3", "none"] = Field(
        "auto", description="how models spell tool calls; auto: as their chat template shows"
    )
    log_format: Literal["text", "json"] = Field("text", description="form of the log lines")
    log_prompts: bool = Field(
        False, description="whether the log holds prompts and completions, in full"
    )
    metrics_compat: Literal["vllm"] | None = Field(
        None, description="whose metrics /metrics shows beside ours, for gateways that read them"
    )
    otel: bool = Field(
        False,
        description="send OpenTelemetry traces over OTLP/HTTP, as the OTEL_* variables of the "
        "environment say; needs the extra otel",
    )

    @field_validator("module_memory", mode="before")
    @classmethod
    def _parse_size(cls, value: object) -> int | None:
        from ..adapters.recipe import parse_size

        return None if value is None else parse_size(value)

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value != "*" and not _ORIGIN.fullmatch(value):
                raise ValueError(
                    f"{value!r} is no origin as browsers send it: write scheme://host or "
                    "scheme://host:port in lower case, without a path or the scheme's usual port, "
                    "or '*' for all"
                )
        return values

    @model_validator(mode="after")
    def _serves_something(self) -> ServeSettings:
        if self.modules and not self.backbone:
            raise ValueError("modules need a backbone: name one")
        if not (self.banks or self.backbone):
            raise ValueError("name a bank, or a backbone with modules")
        self._suits_engine()
        limits_memory = self.module_memory is not None or self.engine.module_slots is not None
        if not limits_memory and (self.pinned_modules or self.prefetch_modules != "all"):
            raise ValueError(
                "pinned_modules and prefetch_modules need module_memory: without it all modules "
                "stay in memory; state it, or leave them out"
            )
        return self

    def _suits_engine(self) -> None:
        if self.engine.kind == "vllm" and self.module_memory is not None:
            raise ValueError(
                "module_memory is for the engine torch: inside vLLM modules take slots, state "
                "engine.module_slots instead"
            )
        if self.engine.kind == "vllm" and self.tool_parser != "auto":
            raise ValueError(
                "tool_parser is for the engine torch: state engine.options: {tool_call_parser: "
                "..., enable_auto_tool_choice: true} instead"
            )

    @property
    def placement(self) -> Placement:
        """Where and how engines run."""
        from ..runtime.options import EngineOptions
        from .hosting import Placement

        options = EngineOptions(
            max_length=self.max_length,
            max_concurrency=self.max_concurrency,
            token_budget=max(512, self.max_concurrency),
            max_waiting=self.pressure.max_waiting,
            module_bytes=self.module_memory,
        )
        return Placement(
            device=self.device,
            dtype=self.dtype,
            options=options,
            pinned=self.pinned_modules,
            prefetch=None if self.prefetch_modules == "all" else self.prefetch_modules,
            servers=self.engine.servers,
        )

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
            stickiness=Stickiness(said.mode, said.margin, said.patience),
            sessions=said.sessions,
            idle_s=said.idle_minutes * 60,
            module_roots=tuple(map(Path, self.module_roots)),
            hub=self.module_sources.hub,
            uploads=self.module_sources.uploads,
            limits=self.limits,
            pressure=self.pressure,
            tool_parser=self.tool_parser,
        )

    def state_path(self, port: int) -> Path | None:
        """Where a server on this port would keep what outlives it; None: nowhere. A server that
        takes any free port has no folder unless one is named: it would not be found again.
        """
        if self.state is not None:
            return None if self.state == NO_STATE else Path(self.state).expanduser()
        if self.port == 0:
            return None
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(home) / "mergeroute" / str(port)

    def state_folder(self, port: int) -> StateFolder | None:
        """The folder at `state_path`; None where nothing is to be kept, or nothing can be written
        in the user's state folder, which is logged.

        Raises:
            SettingsError: the folder that is named cannot be used, or uploads have none.
        """
        from .modules.state import StateFolder

        path = self.state_path(port)
        if path is None and self.module_sources.uploads:
            raise SettingsError("uploads are kept in the state folder: name one with --state")
        if path is None or (self.state is None and not _is_made(path)):
            return None
        return StateFolder(path)

    def open_experiments(self, folder: StateFolder | None) -> LiveExperiments | None:
        """Experiments, whose records are kept in the folder until the database has them; None where
        there is no folder.

        Raises:
            SettingsError: there should be some, and there is no folder; or the database cannot be
                used.
        """
        if folder is None:
            if self.database or self.experiments:
                raise SettingsError(
                    "records of experiments wait in the state folder until the database has them: "
                    "name one (--state, or state in the file), or leave `state: none` out"
                )
            return None
        from .experiments.live import LiveExperiments

        return LiveExperiments(self.database, folder.folder)

    @property
    def telemetry(self) -> Telemetry:
        """What is told of requests.

        Raises:
            SettingsError: traces are wanted, and the packages for them are not installed.
        """
        from .telemetry.options import Telemetry

        return Telemetry(
            metrics_compat=self.metrics_compat,
            traces=_open_traces() if self.otel else None,
            logs_prompts=self.log_prompts,
        )

    def policy(self, *, is_exposed: bool) -> Policy:
        """Who is let in. is_exposed: whether others than this machine reach the server.

        Raises:
            KeyFileError: the file of keys cannot be used.
        """
        from .access.guard import Policy
        from .access.key_file import KeyRing

        ring = None if self.api_keys is None else KeyRing(Path(self.api_keys))
        return Policy(ring, is_exposed, self.cors_origins)

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


def _open_traces() -> Traces:
    try:
        from .telemetry.exporting import open_traces
    except ImportError as error:
        raise SettingsError(
            f"otel needs a package that is not installed ({error.name}): pip install "
            "'mergeroute[otel]'"
        ) from error
    return open_traces()


def _is_made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        logger.warning(
            "%s cannot be made (%s): what is loaded at run time will be forgotten at a restart, "
            "unless --state names a folder",
            folder,
            error.strerror,
        )
        return False
    return True
