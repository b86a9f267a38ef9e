"""Routers on disk: router.json, and the tensors of what was fitted beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.blend import Blend
from ..adapters.errors import BlendError, RouterError
from .learned import Fitted
from .settings import EnsembleSettings, FixedSettings, LearnedSettings, RouterSettings

CONFIG_FILE = "router.json"
TENSORS_FILE = "scorer.safetensors"


class _Settings(BaseModel):
    router: Annotated[RouterSettings, Field(discriminator="scorer")]


def save_router(
    folder: Path,
    settings: RouterSettings,
    *,
    fitted: Mapping[int, Fitted] | Fitted | None = None,
) -> None:
    """Write a router into a folder.

    fitted: the scorer, where it was fitted; of an ensemble by the member's place.

    Raises:
        RouterError: an embedding model that it reads is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fitted is not None:
        save_file(_tensors(fitted), folder / TENSORS_FILE)
    _write(folder, _with_embeddings(settings))


def read_settings(folder: Path) -> RouterSettings:
    """What router.json says.

    Raises:
        RouterError: it is missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text("utf-8"))
        _json(document).encode("utf-8")  # JSON may hold lone surrogates, and nothing else may
        return _Settings.model_validate({"router": document}).router
    except (OSError, ValueError, RecursionError) as error:
        detail = _explained(error) if isinstance(error, ValidationError) else str(error)
        raise RouterError(f"{path} is missing or damaged: {detail}") from error


def modules_of(folder: Path) -> tuple[str, ...]:
    """The modules a router on disk may name, by their new names where they were renamed.

    Raises:
        RouterError: as `read_settings`.
    """
    settings = read_settings(folder)
    renamed = settings.renamed or {}
    return tuple(dict.fromkeys(renamed.get(name, name) for name in settings.known))


def rename_modules(folder: Path, names: Mapping[str, str]) -> None:
    """Tell a router on disk where modules have gone. It is not fitted again: it decides as before,
    and what it gave to the old names goes to the new ones.

    names: old to new; modules that are not named keep theirs. Several may get one name.

    Raises:
        RouterError: as `read_settings`; or a fixed blend would give one module a weight beyond 8.
    """
    settings = read_settings(folder)
    before = settings.renamed or {}
    moved = {name: before.get(name, name) for name in settings.known}
    after = {name: names.get(now, now) for name, now in moved.items()}
    if isinstance(settings, FixedSettings):
        _check_sum(fixed_blend(settings), after)
    renamed = {name: now for name, now in after.items() if now != name}
    _write(folder, settings.model_copy(update={"renamed": renamed or None}))


def fixed_blend(settings: FixedSettings) -> Blend:
    """The blend that a fixed router states.

    Raises:
        RouterError: it cannot be read.
    """
    try:
        return Blend.parse(settings.blend)
    except BlendError as error:
        raise RouterError(f"the fixed router's blend cannot be read: {error}") from error


def _with_embeddings(settings: RouterSettings) -> RouterSettings:
    """With the digests of the embedding models, as they are now."""
    if isinstance(settings, EnsembleSettings):
        members = tuple(_with_embeddings(member) for member in settings.members)
        return settings.model_copy(update={"members": members})
    if not (isinstance(settings, LearnedSettings) and settings.signal.embedding):
        return settings
    from .embedding import digest_of

    return settings.model_copy(update={"embedding": digest_of(settings.signal.embedding)})


def _tensors(fitted: Mapping[int, Fitted] | Fitted) -> dict[str, Tensor]:
    if isinstance(fitted, Mapping):
        states = {f"{place}.": each.state() for place, each in fitted.items()}
        return {f"{prefix}{name}": t for prefix, s in states.items() for name, t in s.items()}
    return dict(fitted.state())


def _check_sum(blend: Blend, names: Mapping[str, str]) -> None:
    try:
        blend.renamed(names)
    except BlendError as error:
        raise RouterError(
            f"the fixed router's weights add up beyond what a module may have: {error}"
        ) from error


def _explained(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][2:])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _write(folder: Path, settings: BaseModel) -> None:
    document: dict[str, Any] = settings.model_dump(mode="json", exclude_none=True)
    (folder / CONFIG_FILE).write_text(_json(document) + "\n", encoding="utf-8")


def _json(document: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(document, indent=2, ensure_ascii=False)
