"""Checks of the machine: packages, device, and what a server needs of its host."""

from __future__ import annotations

import os
import platform
import resource
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..adapters.errors import MergerouteError
from ..runtime.loading import choose_device, choose_dtype
from .access.guard import is_loopback
from .access.key_file import KeyFileError, read_keys
from .errors import SettingsError
from .findings import Finding, required
from .modules.state import StateFolder
from .server import bind
from .settings import ServeSettings

_PACKAGE = "mergeroute"
_TOLD = ("torch", "transformers", "peft")
_NOT_FOR_SERVING = ("dev", "parity")
_OWN_FILES = 256
"""Files that the process holds open beside its connections, and more than it was seen to."""


def check_installation() -> Iterator[Finding]:
    """Python, the packages that are needed, and those that are wanted for some things alone."""
    supported = SpecifierSet(metadata(_PACKAGE)["Requires-Python"] or "")
    python = platform.python_version()
    if python in supported:
        yield Finding("ok", "python", f"{python}, which is {supported}")
    else:
        yield Finding("error", "python", f"{python}, which is not {supported}: install another")
    faults = [fault for need in _requirements() if (fault := _fault(need))]
    for fault in faults:
        yield Finding("error", "packages", fault)
    if not faults:
        told = ", ".join(f"{name} {version(name)}" for name in _TOLD)
        yield Finding("ok", "packages", f"{told}, and all others are in their ranges")
    for extra in metadata(_PACKAGE).get_all("Provides-Extra") or ():
        if extra not in _NOT_FOR_SERVING:
            yield _extra(extra)


def check_device(device: str, dtype: str) -> Iterator[Finding]:
    """Whether the device is there, and whether it is quick with the dtype.

    Raises:
        FaultError: there is no such device or dtype.
    """
    place = required("device", lambda: choose_device(device))
    chosen = required("device", lambda: choose_dtype(dtype, place))
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    name_of_dtype = str(chosen).removeprefix("torch.")
    yield Finding("ok", "device", f"{place} ({name}), {name_of_dtype}")
    if place.type == "cpu" and chosen not in (torch.float32, choose_dtype("auto", place)):
        yield Finding(
            "warning",
            "device",
            f"this CPU does not multiply {name_of_dtype} in hardware, which is slow: "
            "--dtype float32, if the memory allows it",
        )


def check_host(settings: ServeSettings) -> Iterator[Finding]:
    """Address, keys, state, module roots and limits of the process."""
    yield from _address(settings)
    yield from _keys(settings)
    yield _state(settings)
    yield from _roots(settings)
    yield _open_files(settings)
    if settings.otel:
        yield _traces(settings)


def _requirements(extra: str = "") -> list[Requirement]:
    """What the package needs on this machine, or only what an extra adds to it."""
    needs = [Requirement(line) for line in requires(_PACKAGE) or ()]
    if extra:
        return [n for n in needs if n.marker and n.marker.evaluate({"extra": extra})]
    return [n for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]


def _fault(need: Requirement) -> str | None:
    try:
        installed = version(need.name)
    except PackageNotFoundError:
        return f"{need.name} is not installed: pip install '{need.name}{need.specifier}'"
    if need.specifier.contains(installed, prereleases=True):
        return None
    return (
        f"{need.name} is {installed}, {need.specifier} is supported: pip install "
        f"'{need.name}{need.specifier}'"
    )


def _extra(extra: str) -> Finding:
    faults = [fault for need in _requirements(extra) if (fault := _fault(need))]
    if faults:
        return Finding(
            "note", f"extra {extra}", faults[0].replace("pip install", "if wanted, pip install")
        )
    return Finding("ok", f"extra {extra}", "installed")


def _address(settings: ServeSettings) -> Iterator[Finding]:
    try:
        listening = bind(settings.host, settings.port)
    except SettingsError as error:
        yield Finding("error", "address", str(error))
        return
    address = listening.getsockname()[0]
    listening.close()
    yield Finding("ok", "address", f"{settings.host}:{settings.port} is free")
    if settings.api_keys is None and not is_loopback(address):
        yield Finding(
            "warning",
            "address",
            f"anybody who reaches {settings.host} may use the models, since there are no API keys, "
            "and routes that administer are refused: set api_keys, or listen on 127.0.0.1",
        )


def _keys(settings: ServeSettings) -> Iterator[Finding]:
    if settings.api_keys is None:
        yield Finding(
            "note", "keys", "none needed; this machine's own programs may administer, others never"
        )
        return
    path = Path(settings.api_keys)
    try:
        keys = read_keys(path)
    except KeyFileError as error:
        yield Finding("error", "keys", str(error))
        return
    valid = [key for key in keys if key.is_valid(datetime.now(UTC))]
    admins = sum("admin" in key.scopes for key in valid)
    yield Finding("ok", "keys", f"{path}: {len(valid)} valid, {admins} of them with scope admin")
    if expired := sorted(key.name for key in keys if key not in valid):
        yield Finding(
            "warning", "keys", f"{expired[0]!r} has expired: make a new one, or revoke it"
        )
    if not valid:
        yield Finding(
            "warning", "keys", f"{path} lets nobody in: mergeroute key create NAME --file {path}"
        )
    if path.stat().st_mode & stat.S_IROTH:
        yield Finding("warning", "keys", f"{path} may be read by everybody: chmod 600 {path}")


def _state(settings: ServeSettings) -> Finding:
    """Nothing is made where nothing is yet."""
    folder = settings.state_path(settings.port)
    if folder is None:
        if settings.module_sources.uploads:
            return Finding("error", "state", "uploads need a state folder: name one (state)")
        if settings.database or settings.experiments:
            return Finding("error", "state", "experiments need a state folder: name one (state)")
        return Finding("note", "state", "none: a restart forgets what was loaded at run time")
    if folder.exists():
        return _existing_state(folder)
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if os.access(parent, os.W_OK | os.X_OK):
        return Finding("ok", "state", f"{folder} will be made")
    return Finding(
        "error" if settings.state else "warning",
        "state",
        f"{folder} cannot be made, {parent} may not be written: name another folder (state)",
    )


def _existing_state(folder: Path) -> Finding:
    try:
        state = StateFolder(folder)
        try:
            count = sum(len(bank.changes) for bank in state.read().banks)
        finally:
            state.close()
    except MergerouteError as error:
        return Finding("error", "state", str(error))
    return Finding("ok", "state", f"{folder} can be written; changes of modules in it: {count}")


def _roots(settings: ServeSettings) -> Iterator[Finding]:
    for root in settings.module_roots:
        path = Path(root)
        if not path.is_dir():
            remedy = "name one that is there (module_roots)"
            yield Finding("error", "module root", f"{root} is no folder: {remedy}")
        elif not os.access(path, os.R_OK | os.X_OK):
            yield Finding("error", "module root", f"{root} may not be read: change its mode")
        elif path.stat().st_mode & stat.S_IWOTH:
            yield Finding(
                "warning",
                "module root",
                f"{root} may be written by everybody, who may then change modules: "
                f"chmod o-w {root}",
            )
        else:
            yield Finding("ok", "module root", str(path.resolve()))


def _open_files(settings: ServeSettings) -> Finding:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = settings.limits.connections
    if connections is None or allowed == resource.RLIM_INFINITY:
        return Finding("ok", "open files", f"{allowed} allowed, limits.connections {connections}")
    needed = connections + _OWN_FILES
    if allowed >= needed:
        return Finding("ok", "open files", f"{allowed} allowed for {connections} connections")
    return Finding(
        "warning",
        "open files",
        f"{allowed} allowed, {needed} needed for {connections} connections: ulimit -n {needed} "
        "(systemd: LimitNOFILE), or lower limits.connections",
    )


def _traces(settings: ServeSettings) -> Finding:
    try:
        if (traces := settings.telemetry.traces) is not None:
            traces.close()
    except SettingsError as error:
        return Finding("error", "traces", str(error))
    return Finding("ok", "traces", os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318"))
