"""Where modules may be loaded from while the server runs: folders under the roots, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...adapters.module_files import (
    CONFIG_FILE,
    GATES_FILE,
    INT8_FILE,
    VECTORS_FILE,
    WEIGHTS_FILE,
)
from ..errors import ApiError

FILES = (CONFIG_FILE, WEIGHTS_FILE, INT8_FILE, VECTORS_FILE, GATES_FILE)
_SHOWN = 200


def module_folder(path: str, roots: Sequence[Path], *, name: str) -> Path:
    """The folder that a client names, its links followed. roots: resolved; a relative path is
    looked for under each of them.

    What is checked here is what lies there now: who may write under a root may change it before it
    is read, so the roots are for those to write who may load modules.

    Raises:
        ApiError: it, or a file in it, lies outside the roots, is missing, or is of another kind.
    """
    if not roots:
        raise _forbidden("this server has no module roots: start it with --module-root")
    folder = _found(path, roots)
    if folder is None:
        raise ApiError(
            f"Loading lora {name} failed: No adapter found for {path[:_SHOWN]}",
            status=404,
            param="lora_path",
            code="lora_adapter_not_found",
        )
    for file in FILES:
        _check_file(folder / file, roots)
    return folder


def _found(path: str, roots: Sequence[Path]) -> Path | None:
    """The first candidate that is there. What lies outside is refused, there or not."""
    inside = [place for root in roots if _is_under(place := _resolved(root / path), roots)]
    if not inside:
        raise _forbidden(
            f"lora_path {path[:_SHOWN]!r} leads out of the module roots: put the adapter under one "
            "of them, or start the server with --module-root"
        )
    try:
        return next((place for place in inside if place.is_dir()), None)
    except OSError as error:
        raise _invalid(f"lora_path {path[:_SHOWN]!r} cannot be read: {error.strerror}") from error


def _resolved(path: Path) -> Path:
    """With all links followed."""
    try:
        place = path.resolve()
        if place.resolve() != place:  # after a circle, Python leaves links unfollowed
            raise RuntimeError("its links lead in a circle")
        return place
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, links in a circle
        name = str(path)[-_SHOWN:]
        raise _invalid(f"{name!r} in lora_path is no path of this system: {error}") from error


def _check_file(file: Path, roots: Sequence[Path]) -> None:
    """What is there under a module file's name is a regular file under the roots."""
    if not (file.is_symlink() or file.exists()):
        return
    if not _is_under(_resolved(file), roots):
        raise _forbidden(f"{file.name} in lora_path leads out of the module roots")
    if not file.is_file():
        raise _invalid(f"{file.name} in lora_path is no regular file: put the adapter's file there")


def _is_under(place: Path, roots: Sequence[Path]) -> bool:
    return any(place.is_relative_to(root) for root in roots)


def _forbidden(message: str) -> ApiError:
    return ApiError(message, param="lora_path", code="adapter_path_forbidden")


def _invalid(message: str) -> ApiError:
    return ApiError(message, param="lora_path", code="invalid_lora_adapter")
