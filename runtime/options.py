"""The limits of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters.errors import EngineError


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    max_length: most tokens of prompt and completion; None takes the model's, at most 4,096.
    max_concurrency: most requests that run at once. token_budget: most tokens in one forward.
    max_waiting: most requests that wait. module_bytes: most memory of the modules that are loaded,
    taken as a whole with the first; None: as much as they need.
    """

    max_length: int | None = None
    max_concurrency: int = 16
    token_budget: int = 512
    max_waiting: int = 1024
    module_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_concurrency", "token_budget", "max_waiting"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}, at least 1 is needed")
        if self.token_budget < self.max_concurrency:
            raise EngineError(
                f"token_budget {self.token_budget} is below max_concurrency "
                f"{self.max_concurrency}: every running request needs a token per step"
            )


DEFAULT_OPTIONS = EngineOptions()
