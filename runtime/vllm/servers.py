"""How the servers of a backbone are made: by their URLs, or by a command for each."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ...adapters.errors import EngineError
from ...adapters.shapes import Shapes
from .endpoint import Endpoint
from .launch import PluginOptions, padded_rank
from .options import VllmOptions, flag_arguments
from .process import Launch, ServerProcess
from .replicas import Replica

_SERVED_MODEL = "backbone"
_SPARE_SLOTS = 8
_LEAST_RANK = 16
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def plugin_options(servers: VllmOptions, folder: Path, modules: tuple[int, int]) -> PluginOptions:
    """What blends need inside the servers. folder: the gateway's own. modules: how many there will
    be at the start, and the largest rank.
    """
    count, rank = modules
    return PluginOptions(
        modules=(servers.modules_folder or folder / "modules").resolve(),
        slots=servers.slots or count + _SPARE_SLOTS,
        rank=padded_rank(servers.rank or max(rank, _LEAST_RANK)),
        mode=servers.mode,
    )


def targets_of(shapes: Shapes) -> list[str]:
    """The last parts of the names of a backbone's linear layers."""
    return sorted({name.rpartition(".")[2] for name in shapes.linear})


def dtype_flags(dtype: str) -> list[str]:
    """The dtype as vLLM takes it."""
    return [] if dtype == "auto" else ["--dtype", dtype]


def find_program(servers: VllmOptions) -> str:
    """The program that starts a server: one beside this Python goes before one on the path.

    Raises:
        EngineError: there is none.
    """
    beside = Path(sys.executable).parent / servers.command
    found = str(beside) if beside.is_file() else shutil.which(servers.command)
    if found is None:
        raise EngineError(
            f"vLLM is not installed here ({servers.command!r} is no command): run make vllm, or "
            "pip install 'mergeroute[vllm]', or name the program (engine.command)"
        )
    return found


def make_replicas(
    servers: VllmOptions, folder: Path, path: Path, plugin: PluginOptions, flags: Sequence[str]
) -> list[Replica]:
    """All servers; none is started. path: of the backbone. flags: for those that are ours.

    Raises:
        EngineError: there is no program to start them by.
    """
    if servers.urls:
        return [
            Replica(Endpoint(_name(number), url.rstrip("/"), api_key=servers.api_key))
            for number, url in enumerate(servers.urls)
        ]
    logs = servers.log_folder or folder
    logs.mkdir(parents=True, exist_ok=True)
    command = [
        find_program(servers),
        "serve",
        str(path),
        *("--served-model-name", _SERVED_MODEL),
        *("--api-server-count", "1"),  # else one per data-parallel rank
        "--disable-uvicorn-access-log",  # the gateway has lines of its own
        *flags,
        *flag_arguments(servers.flags),
    ]
    return [
        _replica(number, folder, logs, command, servers, plugin)
        for number in range(servers.replicas)
    ]


def _name(number: int) -> str:
    return f"vllm-{number}"


def _replica(
    number: int,
    folder: Path,
    logs: Path,
    command: Sequence[str],
    servers: VllmOptions,
    plugin: PluginOptions,
) -> Replica:
    name = _name(number)
    socket = folder / f"{number}.sock"
    device = {"CUDA_VISIBLE_DEVICES": servers.devices[number]} if servers.devices else {}
    launch = Launch(
        [*command, "--uds", str(socket)],
        logs / f"{name}.log",
        {**_ENVIRONMENT, **plugin.environment, **device},
        servers.grace_s,
        folder,
    )
    return Replica(Endpoint(name, "http://vllm", socket), ServerProcess(launch))
