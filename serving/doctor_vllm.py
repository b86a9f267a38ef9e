"""Checks of what the engine vllm needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ..adapters.bank import Bank
from ..runtime.vllm.endpoint import Endpoint
from ..runtime.vllm.greetings import look
from ..runtime.vllm.options import VllmOptions
from ..runtime.vllm.servers import find_program
from .doctor_load import check_load
from .findings import Finding, required
from .settings import ServeSettings

_LOOK_S = 5.0


def check_servers(settings: ServeSettings, banks: Sequence[Bank], loads: bool) -> Iterator[Finding]:
    """Whether there are servers, or a program that they can be started by, and whether the banks'
    modules and routers would do. loads: run the routers.
    """
    servers = required("engine", lambda: settings.engine.servers)
    assert servers is not None
    if servers.urls:
        yield from _running(servers)
        yield Finding("note", "load", "modules were not tried: their folder is the servers'")
        return
    yield required("engine", lambda: _program(servers))
    yield Finding("note", "memory", "vLLM takes what its own options say: it was not reckoned")
    if loads:
        said = "modules fit, routers run; vLLM did not"
        yield from check_load(banks, settings, said, starts=False)


def _running(servers: VllmOptions) -> Iterator[Finding]:
    for url in servers.urls:
        with Endpoint(url, url, api_key=servers.api_key).client(_LOOK_S) as client:
            health = look(client)
        if health == "well":
            yield Finding("ok", "engine", f"the vLLM server at {url} is well")
        else:
            told = "does not answer" if health == "silent" else "cannot be reached, or is not well"
            yield Finding("error", "engine", f"the vLLM server at {url} {told}: start it")
    folder = servers.modules_folder or Path()
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        yield Finding("ok", "engine", f"modules go to {folder}")
    else:
        remedy = "make it, and start the servers with MERGEROUTE_VLLM_MODULES"
        yield Finding("error", "engine", f"{folder} is no folder that can be written: {remedy}")


def _program(servers: VllmOptions) -> Finding:
    found = find_program(servers)
    try:
        here = version("vllm")
    except PackageNotFoundError:
        return Finding("ok", "engine", f"{found}, of another environment: its version is unknown")
    wanted = [Requirement(text) for text in requires("mergeroute") or ()]
    tested = next(one.specifier for one in wanted if one.name == "vllm")
    if here not in tested:
        return Finding(
            "warning", "engine", f"vllm {here} was not tested, {tested} was: install one of these"
        )
    return Finding("ok", "engine", f"vllm {here}: {found}")
