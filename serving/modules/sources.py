"""Where the files of a module come from: a folder under a root, the hub, or an upload."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..access.limits import DEFAULT_LIMITS, Limits
from ..errors import ApiError
from .paths import FILES, module_folder
from .sizes import check_sizes

_HUB_ID = re.compile(r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?:@(?P<revision>[\w./-]{1,128}))?")


@dataclass(frozen=True)
class Sources:
    """Where modules may come from while the server runs, and how large they may be.

    roots: resolved folders. hub: whether a hub id may be named, whose files are downloaded into the
    hub's cache. uploads: where uploaded modules lie; None: none are taken.
    """

    roots: tuple[Path, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    hub: bool = False
    uploads: Path | None = None

    def folder(self, path: str, *, name: str) -> Path:
        """The folder that a client names, its sizes checked. Nothing is downloaded.

        Raises:
            ApiError: it is not there or not allowed, or its files are too large or damaged.
        """
        try:
            folder = module_folder(path, self._places, name=name)
        except ApiError:
            if (cached := self._cached(path)) is None:
                raise
            folder = module_folder(str(cached), self._places, name=name)
        check_sizes(folder, self.limits)
        return folder

    def is_on_hub(self, path: str) -> bool:
        """Whether it is a hub id that may be named, and no folder under a root."""
        is_id = self.hub and _HUB_ID.fullmatch(path) is not None
        return is_id and not any((root / path).is_dir() for root in self.roots)

    def download(self, path: str) -> None:
        """Have the files of a hub id in the hub's cache.

        Raises:
            ApiError: there is no such thing on the hub, it is too large, or the hub cannot be
                reached and the cache lacks it.
        """
        if asked := _HUB_ID.fullmatch(path):
            _download(asked["repo"], asked["revision"], self.limits)

    @property
    def _places(self) -> tuple[Path, ...]:
        places = list(self.roots)
        if self.uploads is not None:
            places.append(self.uploads.resolve())
        if self.hub:
            places.append(_cache())
        return tuple(places)

    def _cached(self, path: str) -> Path | None:
        asked = _HUB_ID.fullmatch(path)
        return _snapshot(asked["repo"], asked["revision"]) if self.hub and asked else None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """A repository's folder in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(FILES), local_files_only=True
        )
    except (OSError, ValueError):  # not there, not whole, or no id
        return None
    return Path(str(found))


def _download(repo: str, revision: str | None, limits: Limits) -> None:
    """The files that count, once their sizes are known."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = f"{repo}@{revision}" if revision else repo
    unknown = (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)
    try:
        planned = snapshot_download(
            repo, revision=revision, allow_patterns=list(FILES), dry_run=True
        )
        _check_size(shown, sum(file.file_size for file in planned), limits)
        snapshot_download(repo, revision=revision, allow_patterns=list(FILES))
    except (DryRunError, OSError, ValueError) as error:
        if isinstance(error, unknown) or isinstance(error.__cause__, unknown):
            raise _failed(shown, "the hub has no such repository or revision", 404) from error
        if _snapshot(repo, revision) is None:
            why = "the hub cannot be reached, and its cache does not hold it"
            raise _failed(shown, f"{why} ({type(error.__cause__ or error).__name__})") from error


def _check_size(shown: str, size: int, limits: Limits) -> None:
    if size > limits.module_bytes:
        raise ApiError(
            f"{shown} has {size:,} bytes, the limit is {limits.module_bytes:,} "
            "(limits.module_bytes)",
            param="lora_path",
            code="lora_byte_limit_exceeded",
        )


def _failed(shown: str, why: str, status: int = 400) -> ApiError:
    code = "lora_adapter_not_found" if status == 404 else "hub_unreachable"
    message = f"Loading lora from {shown} failed: {why}"
    return ApiError(message, status=status, param="lora_path", code=code)
