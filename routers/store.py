"""Routers on disk: router.json, and the scorer's tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..adapters.blend import Blend
from ..adapters.digest import file_digest, json_digest
from ..adapters.errors import BlendError, RouterError
from .base import Encode, Scorer, Signal
from .fixed import Fixed
from .policies import Policy
from .prototype import Prototype
from .router import Router
from .signals import HiddenState, NoSignal

CONFIG_FILE = "router.json"
TENSORS_FILE = "scorer.safetensors"
DEFAULT_POLICY = "softmax(0.5) | top_k(1) | abstain(0.005) | quantise"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SignalSettings(_Strict):
    """Which hidden state is read."""

    layer: int = Field(2, ge=1, description="how many of the backbone's layers are run")
    pooling: Literal["mean", "last"] = Field("mean", description="over the prompt's tokens")


class _Renaming(_Strict):
    renamed: dict[str, str] | None = Field(
        None, description="where modules have gone since, by the name the scorer knows"
    )


class PrototypeSettings(_Renaming):
    """A fitted prototype router."""

    scorer: Literal["prototype"] = "prototype"
    modules: tuple[str, ...] = Field(min_length=1, description="in the order of the means")
    signal: SignalSettings = Field(default_factory=SignalSettings, description="what is read")
    policy: str = Field(DEFAULT_POLICY, description="steps joined by |")

    @model_validator(mode="after")
    def _check_renamed(self) -> Self:
        if unknown := set(self.renamed or ()) - set(self.modules):
            raise ValueError(f"renamed speaks of {min(unknown)!r}, which is none of modules")
        return self


class FixedSettings(_Renaming):
    """The same blend for every prompt."""

    scorer: Literal["fixed"] = "fixed"
    blend: str = Field(description="name=weight, joined by commas")


class _Settings(BaseModel):
    router: Annotated[PrototypeSettings | FixedSettings, Field(discriminator="scorer")]


def save_prototype(folder: Path, scorer: Prototype, settings: PrototypeSettings) -> None:
    """Write a fitted router into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(scorer.state(), folder / TENSORS_FILE)
    _write(folder, settings)


def save_fixed(folder: Path, blend: Blend) -> None:
    """Write a router that always answers with one blend."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, FixedSettings(blend=blend.weights_text))


def load_router(folder: Path, *, encode: Encode) -> Router:
    """Read a router. encode: runs the backbone's first layers.

    Raises:
        RouterError: a file is missing or damaged, or a setting is out of range.
    """
    settings = _read(folder)
    policy = "quantise" if isinstance(settings, FixedSettings) else settings.policy
    signal, scorer = _parts(folder, settings, encode)
    return Router(
        signal, scorer, Policy.parse(policy), digest=_digest(folder), renamed=settings.renamed or {}
    )


def modules_of(folder: Path) -> tuple[str, ...]:
    """The modules a router on disk may name, by their new names where they were renamed.

    Raises:
        RouterError: as `load_router`.
    """
    settings = _read(folder)
    renamed = settings.renamed or {}
    return tuple(dict.fromkeys(renamed.get(name, name) for name in _known(settings)))


def rename_modules(folder: Path, names: Mapping[str, str]) -> None:
    """Tell a router on disk where modules have gone. It is not fitted again: it decides as before,
    and what it gave to the old names goes to the new ones.

    names: old to new; modules that are not named keep theirs. Several may get one name.

    Raises:
        RouterError: as `load_router`; or a fixed blend would give one module a weight beyond 8.
    """
    settings = _read(folder)
    before = settings.renamed or {}
    moved = {name: before.get(name, name) for name in _known(settings)}
    after = {name: names.get(now, now) for name, now in moved.items()}
    if isinstance(settings, FixedSettings):
        _check_sum(_blend(settings), after)
    renamed = {name: now for name, now in after.items() if now != name}
    _write(folder, settings.model_copy(update={"renamed": renamed or None}))


def _known(settings: PrototypeSettings | FixedSettings) -> tuple[str, ...]:
    """The modules as the scorer knows them."""
    return tuple(_blend(settings)) if isinstance(settings, FixedSettings) else settings.modules


def _check_sum(blend: Blend, names: Mapping[str, str]) -> None:
    try:
        blend.renamed(names)
    except BlendError as error:
        raise RouterError(
            f"the fixed router's weights add up beyond what a module may have: {error}"
        ) from error


def _parts(
    folder: Path, settings: PrototypeSettings | FixedSettings, encode: Encode
) -> tuple[Signal, Scorer]:
    if isinstance(settings, FixedSettings):
        return NoSignal(), Fixed(_blend(settings))
    try:
        state = load_file(folder / TENSORS_FILE)
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{folder / TENSORS_FILE} is missing or damaged: {error}") from error
    signal = HiddenState(encode, settings.signal.layer, settings.signal.pooling)
    return signal, Prototype.from_state(state, settings.modules)


def _blend(settings: FixedSettings) -> Blend:
    try:
        return Blend.parse(settings.blend)
    except BlendError as error:
        raise RouterError(f"the fixed router's blend cannot be read: {error}") from error


def _read(folder: Path) -> PrototypeSettings | FixedSettings:
    path = folder / CONFIG_FILE
    try:
        return _Settings.model_validate({"router": json.loads(path.read_text())}).router
    except (OSError, ValueError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise RouterError(f"{path} is missing or damaged: {detail}") from error


def _write(folder: Path, settings: BaseModel) -> None:
    text = json.dumps(settings.model_dump(mode="json", exclude_none=True), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return json_digest({path.name: file_digest(path) for path in files})
