"""Routers on disk: router.json, and the scorer's tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
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


class PrototypeSettings(_Strict):
    """A fitted prototype router."""

    scorer: Literal["prototype"] = "prototype"
    modules: tuple[str, ...] = Field(min_length=1, description="in the order of the means")
    signal: SignalSettings = Field(default_factory=SignalSettings, description="what is read")
    policy: str = Field(DEFAULT_POLICY, description="steps joined by |")


class FixedSettings(_Strict):
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
    return Router(signal, scorer, Policy.parse(policy), digest=_digest(folder))


def modules_of(folder: Path) -> tuple[str, ...]:
    """The modules a router on disk may name.

    Raises:
        RouterError: as `load_router`.
    """
    settings = _read(folder)
    return tuple(_blend(settings)) if isinstance(settings, FixedSettings) else settings.modules


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
    text = json.dumps(settings.model_dump(mode="json"), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return json_digest({path.name: file_digest(path) for path in files})
