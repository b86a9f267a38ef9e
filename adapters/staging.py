"""Staging: a folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import BankError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well. However else it
    ends, everything is as it was; folders made on the way to `target` are gone too.

    Raises:
        BankError: the disk is full, or the folder cannot be written.
    """
    made = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            _open_to_readers(folder)
            _put(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise BankError(f"{target} cannot be written: {error}") from error
    finally:
        for parent in made:
            _remove_empty(parent)


def _open_to_readers(folder: Path) -> None:
    """Let others read what is written: who builds is often not who serves."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _put(folder: Path, target: Path) -> None:
    """Rename a folder to `target`; what stood there is put back if that fails."""
    if not target.exists():
        os.rename(folder, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.rename(target, old / target.name)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(old / target.name, target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
