"""What servers are used, and how they are started."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...adapters.errors import EngineError
from .launch import Mode

FlagValue = str | int | float | bool | None | Sequence[str | int | float] | Mapping[str, object]
_FLAG = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]*")

_OURS = {
    "api-key": "no address of the server's own is open",
    "api-server-count": "use replicas instead",
    "config": "write its options here",
    "dtype": "use the setting dtype",
    "enable-lora": "it is always set",
    "fully-sharded-loras": "blends need whole factors",
    "enable-dbo": "blends need whole batches",
    "host": "the server listens on a socket that only this gateway reaches",
    "lora-dtype": "modules have the backbone's",
    "lora-modules": "modules belong to banks, or are loaded while the server runs",
    "lora-target-modules": "it is read off the backbone: its inner linear layers",
    "max-cpu-loras": "use module_slots",
    "max-lora-rank": "use module_rank",
    "max-loras": "use the setting max_concurrency",
    "max-model-len": "use the setting max_length",
    "max-num-seqs": "use the setting max_concurrency",
    "middleware": "it would see requests before they are counted",
    "model": "the bank names its backbone",
    "port": "the server listens on a socket that only this gateway reaches",
    "prefill-context-parallel-size": "blends need whole batches",
    "root-path": "the gateway is what clients see",
    "served-model-name": "the gateway names its targets",
    "ssl-certfile": "the server listens on a socket that only this gateway reaches",
    "ssl-keyfile": "the server listens on a socket that only this gateway reaches",
    "tokenizer": "the backbone's folder holds it",
    "ubatch-size": "blends need whole batches",
    "uds": "the gateway chooses it",
}
"""Options of `vllm serve` that are not passed through, with what to do instead."""


@dataclass(frozen=True)
class VllmOptions:
    """Which servers, and how long is waited for them.

    urls: of servers that run already; empty: `replicas` are started. api_key: what those let in.
    modules_folder: that servers of others read modules from. command: the program, or its path.
    flags: options of `vllm serve` by name. devices: CUDA_VISIBLE_DEVICES of each replica.
    slots: most modules at once; rank: the largest of theirs; None: what the banks need, and more.
    mode: how blends are served inside vLLM, see `PluginOptions`.
    start_s: until a server that was started is ready. first_s: until a stream's first chunk, next_s
    until the next one, whole_s until an answer that is not streamed. probe_s: between two looks at
    a server. silent_s: how long it may not answer these before it gets no requests and those that
    run on it are given up, hung_s: before it is started again. again_s: until a module that it
    refused is tried again. grace_s: for a server to end by itself. log_folder: of what they print.
    """

    urls: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    modules_folder: Path | None = None
    replicas: int = 1
    command: str = "vllm"
    flags: Mapping[str, FlagValue] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    slots: int | None = None
    rank: int | None = None
    mode: Mode = "virtual"
    start_s: float = 900.0
    first_s: float = 300.0
    next_s: float = 120.0
    whole_s: float = 1800.0
    probe_s: float = 1.0
    silent_s: float = 15.0
    hung_s: float = 60.0
    again_s: float = 5.0
    grace_s: float = 15.0
    log_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.urls and not self.modules_folder:
            raise EngineError(
                "engine.urls needs engine.modules_folder: the folder that these servers were "
                "started with (MERGEROUTE_VLLM_MODULES), and that this gateway can write"
            )
        if self.devices and len(self.devices) != self.replicas:
            raise EngineError(
                f"engine.devices names {len(self.devices)} and engine.replicas is "
                f"{self.replicas}: name one per replica, as '0' or '0,1'"
            )
        list(flag_arguments(self.flags))


def flag_arguments(flags: Mapping[str, FlagValue]) -> Iterator[str]:
    """Arguments of `vllm serve`: true is the flag alone, false its `--no-`, null nothing, a list
    several values and a mapping JSON.

    Raises:
        EngineError: a flag is ours to set, or is none.
    """
    for name, value in flags.items():
        flag = name.removeprefix("--").replace("_", "-")
        if not _FLAG.fullmatch(flag):
            raise EngineError(
                f"engine.options names {name!r}, which is no option: write as "
                "tensor_parallel_size: 2"
            )
        if (ours := flag.removeprefix("no-")) in _OURS:
            raise EngineError(f"engine.options may not hold {name!r}: {_OURS[ours]}")
        if value is None:
            continue
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, Mapping):
            yield from (f"--{flag}", json.dumps(value))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield f"--{flag}={value}"
