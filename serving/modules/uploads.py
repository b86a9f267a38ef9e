"""Modules that clients send: an archive in, a folder of safetensors out, or nothing."""

from __future__ import annotations

import asyncio
import errno
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ...adapters.digest import file_digest, json_digest, short
from ...adapters.errors import ModuleError
from ...adapters.lora import Module
from ...adapters.module_files import module_files
from ..access.limits import Limits
from ..errors import CLIENT_CLOSED, ApiError
from .paths import FILES
from .sizes import check_sizes
from .state import State

_BLOCK = 1 << 20
_MOST_ENTRIES = 32
_ARCHIVE_OVERHEAD = 1 << 20
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_PREFIX = ".upload."
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError),
    RecursionError,  # tarfile calls itself for every header that stands before another
)

Entry = tuple[str, int, Callable[[], IO[bytes]]]
"""Path in the archive, bytes, and what opens it."""


async def receive(request: Request, uploads: Path, limits: Limits) -> Path:
    """Take the archive that a request carries, as its body or as the file of a form, and put the
    module in it into a folder of its own, named by its content.

    Raises:
        ApiError: it is too large or too slow, or holds no module that can be served.
    """
    await asyncio.to_thread(uploads.mkdir, parents=True, exist_ok=True)
    with _disk_errors(), TemporaryDirectory(prefix=_PREFIX, dir=uploads) as scratch:
        archive = Path(scratch) / "archive"
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            await _save_form(request, archive, limits)
        else:
            await _save(_chunks(request, limits), archive)
        return await asyncio.to_thread(_unpacked, archive, uploads, limits)


def remove_unused(uploads: Path, state: State) -> None:
    """Remove uploaded modules that no state names, and what was left unfinished."""
    used = {change.path for bank in state.banks for change in bank.changes}
    for folder in uploads.iterdir() if uploads.is_dir() else ():
        if str(folder.resolve()) not in used:
            shutil.rmtree(folder, ignore_errors=True)


async def _chunks(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """The body as it comes, within its size, each part in time."""
    size, most = 0, limits.module_bytes + _ARCHIVE_OVERHEAD
    parts = request.stream()
    while True:
        try:
            async with asyncio.timeout(limits.body_seconds):
                part = await anext(parts, None)
        except TimeoutError as error:
            raise ApiError(
                f"nothing of the body arrived for {limits.body_seconds:g} s (limits.body_seconds)",
                status=408,
                code="request_timeout",
            ) from error
        except ClientDisconnect as error:
            raise ApiError("the client closed the connection", status=CLIENT_CLOSED) from error
        if part is None:
            return
        size += len(part)
        if size > most:
            raise ApiError(
                f"the upload is over {most:,} bytes (limits.module_bytes): send less",
                status=413,
                code="lora_byte_limit_exceeded",
            )
        yield part


async def _save(parts: AsyncIterator[bytes], archive: Path) -> None:
    with archive.open("wb") as file:
        async for part in parts:
            await asyncio.to_thread(file.write, part)


async def _save_form(request: Request, archive: Path, limits: Limits) -> None:
    """The one file of a form."""
    parts = cast("Any", _chunks(request, limits))
    try:
        form = await MultiPartParser(request.headers, parts, max_files=1, max_fields=4).parse()
    except (MultiPartException, KeyError) as error:
        raise _invalid(f"the form cannot be read ({error}): send one file in it") from error
    try:
        sent = next((value for value in form.values() if isinstance(value, UploadFile)), None)
        if sent is None:
            raise _invalid("the form holds no file: send the archive as one")
        with archive.open("wb") as file:
            await asyncio.to_thread(shutil.copyfileobj, sent.file, file, _BLOCK)
    finally:
        await form.close()


def _unpacked(archive: Path, uploads: Path, limits: Limits) -> Path:
    folder = archive.parent / "module"
    folder.mkdir()
    with (
        _damage_told(),
        archive.open("rb") as file,
        _entries(_Sips(file)) as entries,
    ):
        _unpack(entries, folder, limits)
    check_sizes(folder, limits)
    try:
        files = module_files(folder)
        Module.read(folder, name="upload")
    except ModuleError as error:
        raise _invalid(str(error).replace(str(folder), "the archive")) from error
    digest = json_digest({file.name: file_digest(file) for file in files})
    target = uploads.resolve() / short(digest)
    if not target.is_dir():
        folder.rename(target)
    return target


class _Sips:
    """A file that is read a little at a time: an archive's own headers may claim to be as long as
    the archive, and are read in one go.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes.

        Raises:
            ApiError: that is more than any header has.
        """
        if size > 4 * _BLOCK:
            raise _invalid("the archive is damaged: it has headers that are too long")
        return self._file.read(size if size >= 0 else 4 * _BLOCK)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - seek, tell, ...
        return getattr(self._file, name)


@contextmanager
def _entries(file: _Sips) -> Iterator[Iterator[Entry]]:
    """What a zip file, or an uncompressed tar file, holds, as far as it goes."""
    source = cast("IO[bytes]", file)
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            yield _zip_entries(archive)
        return
    file.seek(0)
    try:
        opened = tarfile.open(fileobj=source, mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise _invalid("the body is neither a zip file nor an uncompressed tar file") from error
    with opened:
        yield _tar_entries(opened)


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[Entry]:
    for info in archive.infolist():
        kind = info.external_attr >> 16 & 0o170000
        if info.is_dir():
            continue
        if kind not in (0, 0o100000):
            raise _invalid(f"{info.filename[:200]!r} in the archive is no regular file")
        if info.compress_type not in _COMPRESSION or info.flag_bits & 0x61:
            raise _invalid("the archive is encrypted, or of a kind of compression that is not read")
        yield info.filename, info.file_size, partial(archive.open, info)


def _tar_entries(archive: tarfile.TarFile) -> Iterator[Entry]:
    for number, info in enumerate(archive):
        if number >= 2 * _MOST_ENTRIES:  # tarfile keeps them all in memory
            raise _invalid(f"the archive holds over {2 * _MOST_ENTRIES} files and folders")
        if info.isdir():
            continue
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _invalid(f"{info.name[:200]!r} in the archive is no regular file")
        yield (
            info.name,
            info.size,
            cast("Callable[[], IO[bytes]]", partial(archive.extractfile, info)),
        )


def _unpack(entries: Iterator[Entry], folder: Path, limits: Limits) -> None:
    """Write the files of one module, which is all that an archive may hold, into a folder."""
    total, parents = 0, set()
    for number, (path, size, opened) in enumerate(entries):
        name = _file_name(path)
        parents.add(PurePosixPath(path).parent)
        total += size
        if total > limits.module_bytes or number >= _MOST_ENTRIES:
            raise _invalid(
                f"the archive holds over {limits.module_bytes:,} bytes (limits.module_bytes)"
            )
        if len(parents) > 1 or (folder / name).exists():
            raise _invalid("the archive holds several folders, or a file twice: send one module")
        with opened() as source, (folder / name).open("xb") as file:
            _copy(source, file, size)


def _file_name(path: str) -> str:
    """The name of a module's file, at the top of the archive or in one folder."""
    parts = PurePosixPath(path).parts
    if ".." in parts or path.startswith("/") or len(parts) > 2 or parts[-1:][0] not in FILES:
        raise _invalid(
            f"the archive holds {path[:200]!r}: send {', '.join(FILES[:2])} and what lies beside "
            "them in our own module folders, and nothing else"
        )
    return parts[-1]


def _copy(source: IO[bytes], file: IO[bytes], size: int) -> None:
    """So many bytes, whatever else would come."""
    while size and (block := source.read(min(size, _BLOCK))):
        file.write(block)
        size -= len(block)


@contextmanager
def _damage_told() -> Iterator[None]:
    """What the readers of archives raise at bytes that make no sense, a seek to before the file's
    beginning among it.
    """
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _invalid(f"the archive is damaged: {error}") from error


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ApiError(
            f"the upload cannot be written ({error.strerror}): make room in the state folder",
            status=507,
            code="state_not_written",
        ) from error


def _invalid(message: str) -> ApiError:
    return ApiError(message, param="file", code="invalid_lora_adapter")
