"""What became of the modules since the banks were opened, kept in a folder so that a restart brings
it back.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ApiError, SettingsError
from ..hosted import HostedBank

STATE_FILE = "modules.json"
UPLOADS = "uploads"
_LOCK = "lock"


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleChange(_Kept):
    """What became of one module.

    before: digest of what the bank has under this name on disk; None: nothing. digest: of what
    answers instead; None: nothing does. error: why it is not served now, in this process.
    """

    name: str
    before: str | None = None
    digest: str | None = None
    path: str = ""
    description: str = ""
    samples: tuple[str, ...] = ()
    pinned: bool = False
    error: str | None = Field(None, exclude=True)


class BankState(_Kept):
    """The changes of a bank, the latest last, and the generation that each name has come to. A bank
    is known by its name and its backbone, so that changes outlive a bank that is built anew.
    """

    name: str
    backbone: str
    generations: dict[str, int] = Field(default_factory=dict)
    changes: tuple[ModuleChange, ...] = ()

    def change(self, name: str) -> ModuleChange | None:
        """The last change of a name."""
        return next((change for change in self.changes if change.name == name), None)

    def changed(self, change: ModuleChange, *, generation: int) -> BankState:
        """After one change more; what leaves a name as it is on disk is not remembered."""
        kept = tuple(each for each in self.changes if each.name != change.name)
        is_undone = change.digest is None and change.before is None
        return self.model_copy(
            update={
                "changes": kept if is_undone else (*kept, change),
                "generations": {**self.generations, change.name: generation},
            }
        )


class State(_Kept):
    """The changes of all banks, also of those that are not served now."""

    format: Literal[1] = 1
    banks: tuple[BankState, ...] = ()

    def of(self, host: HostedBank) -> BankState:
        """The changes of one bank."""
        empty = BankState(name=host.bank.name, backbone=host.bank.backbone.digest)
        return next((bank for bank in self.banks if _is_same(bank, empty)), empty)

    def replacing(self, after: BankState) -> State:
        """With what is now known of one bank."""
        kept = tuple(bank for bank in self.banks if not _is_same(bank, after))
        return self.model_copy(update={"banks": (*kept, after)})

    def last_generation(self, host: HostedBank, name: str) -> int:
        """The highest a name ever had: 0 before anything had it, 1 as it came with its bank."""
        came_with_bank = int(any(module.name == name for module in host.opened.modules))
        return self.of(host).generations.get(name, came_with_bank)

    def generations(self, host: HostedBank) -> dict[str, int]:
        """Of what has each name now, or should."""
        told = self.of(host)
        highest = {module.name: 1 for module in host.opened.modules} | told.generations
        failed = (change.name for change in told.changes if change.error is not None)
        return {name: highest.get(name, 0) for name in (*host.digests, *failed)}

    def generation(self, host: HostedBank, name: str) -> int:
        """Of what has the name now, or should; 0: nothing has."""
        return self.generations(host).get(name, 0)


class StateFolder:
    """A folder that one server at a time keeps its state in.

    Raises:
        SettingsError: it cannot be made or written, or another server keeps its state there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder / _LOCK).open("a+")
        except OSError as error:
            raise SettingsError(
                f"the state folder {folder} cannot be used ({error.strerror}): name another with "
                "--state, or --state none"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SettingsError(
                f"another server keeps its state in {folder}: stop it, or give this one a folder "
                "of its own with --state"
            ) from error

    @property
    def uploads(self) -> Path:
        """Where uploaded modules lie, one folder each."""
        return self.folder / UPLOADS

    def read(self) -> State:
        """What was written last.

        Raises:
            SettingsError: the file is damaged, or of a newer version.
        """
        path = self.folder / STATE_FILE
        try:
            return State.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return State()
        except (OSError, ValidationError) as error:
            raise SettingsError(
                f"{path} cannot be read: put back a copy, or move it away to serve the banks as "
                f"they are on disk ({error})"
            ) from error

    def write(self, state: State) -> None:
        """Put a new state in the old one's place: whenever the power goes, one of the two is there.

        Raises:
            ApiError: the disk is full, or fails; the old state is there.
        """
        if self._lock.closed:
            raise ApiError("the server stops", status=503, code="not_ready")
        new = self.folder / f"{STATE_FILE}.new"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(state.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.folder / STATE_FILE)
            _sync(self.folder)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise ApiError(
                f"the change cannot be written into the state folder {self.folder} "
                f"({error.strerror}), so it was not made: make room there",
                status=507,
                code="state_not_written",
            ) from error

    def close(self) -> None:
        """Leave it to others."""
        self._lock.close()


def _is_same(one: BankState, other: BankState) -> bool:
    return (one.name, one.backbone) == (other.name, other.backbone)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
