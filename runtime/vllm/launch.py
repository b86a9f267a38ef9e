"""What a vLLM server is started with so that it serves blends: environment and command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ...adapters.errors import EngineError, ModuleError
from .store import ModuleStore

Mode = Literal["virtual", "materialise", "auto"]

MODULES_VARIABLE = "MERGEROUTE_VLLM_MODULES"
SLOTS_VARIABLE = "MERGEROUTE_VLLM_SLOTS"
RANK_VARIABLE = "MERGEROUTE_VLLM_RANK"
MODE_VARIABLE = "MERGEROUTE_VLLM_MODE"

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes, in vLLM 0.20 to 0.33."""


@dataclass(frozen=True)
class PluginOptions:
    """How blends are served inside vLLM.

    modules: the folder of a `ModuleStore`, seen by all processes of the server.
    slots: most modules registered at once; their memory is taken at the start.
    rank: the largest rank of a module, one of `RANKS`.
    mode: virtual blends need a vLLM whose inner seams were tested and are checked at the start;
        materialise writes one LoRA a blend, through vLLM's public interface, much slower; auto is
        virtual, unless the version was not tested or has failed its check on this folder.

    Raises:
        EngineError: a value is out of range.
    """

    modules: Path
    slots: int = 8
    rank: int = 16
    mode: Mode = "virtual"

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise EngineError(f"{SLOTS_VARIABLE} is {self.slots}: at least 1")
        if self.rank not in RANKS:
            raise EngineError(
                f"{RANK_VARIABLE} is {self.rank}: one of {', '.join(map(str, RANKS))}"
            )
        if self.mode not in get_args(Mode):
            raise EngineError(
                f"{MODE_VARIABLE} is {self.mode!r}: one of {', '.join(get_args(Mode))}"
            )

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> PluginOptions | None:
        """What a process of vLLM was told; None: to leave vLLM as it is.

        Raises:
            EngineError: a value is out of range.
        """
        folder = environment.get(MODULES_VARIABLE)
        if not folder:
            return None
        return cls(
            modules=Path(folder),
            slots=_number(environment, SLOTS_VARIABLE, cls.slots),
            rank=_number(environment, RANK_VARIABLE, cls.rank),
            mode=environment.get(MODE_VARIABLE, cls.mode),  # type: ignore[arg-type] # checked above
        )

    @property
    def store(self) -> ModuleStore:
        """The folder of modules."""
        return ModuleStore(self.modules, slots=self.slots, rank=self.rank)

    @property
    def environment(self) -> dict[str, str]:
        """Variables to start vLLM with."""
        variables = {
            MODULES_VARIABLE: str(self.modules),
            SLOTS_VARIABLE: str(self.slots),
            RANK_VARIABLE: str(self.rank),
            MODE_VARIABLE: self.mode,
        }
        if self.mode != "virtual":  # the public interface asks for it; it opens vLLM's own routes
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        return variables

    def arguments(self, max_num_seqs: int, *, targets: Sequence[str] = ()) -> list[str]:
        """Flags of `vllm serve`.

        max_num_seqs: most requests in a step, each of which may have a blend of its own.
        targets: last parts of the names of the linear layers, for materialised blends: vLLM then
            leaves the head alone, where scoring prompts beside LoRAs brings it down.
        """
        numbers = {"max-num-seqs": max_num_seqs, "max-lora-rank": self.rank}
        if self.mode == "virtual":
            numbers["max-loras"] = max_num_seqs
        else:  # slots are memory, and ranks of a blend's modules add up
            numbers["max-loras"] = min(self.slots, max_num_seqs)
            numbers["max-cpu-loras"] = max(64, numbers["max-loras"])
            numbers["max-lora-rank"] = padded_rank(min(self.rank * self.slots, RANKS[-1]))
        flags = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        chosen = ["--lora-target-modules", *targets] if targets else []
        return ["--enable-lora", *flags, *chosen]


def padded_rank(rank: int) -> int:
    """The least rank that vLLM takes and that holds modules of this one.

    Raises:
        ModuleError: vLLM has none so large.
    """
    fitting = [known for known in RANKS if known >= rank]
    if not fitting:
        raise ModuleError(f"rank {rank} is over {RANKS[-1]}, the most that vLLM serves: compact it")
    return fitting[0]


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise EngineError(f"{name} is {text!r}: give a whole number") from error
