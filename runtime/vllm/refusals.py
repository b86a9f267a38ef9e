"""What a server's error means to us."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...adapters.errors import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    MergerouteError,
    ModuleUnavailableError,
    QueueFullError,
    RequestError,
)

_TOO_LONG = re.compile(r"context length|max_model_len|maximum (model|input) length", re.IGNORECASE)
_SHOWN = 600
_FAULTS_OF_THE_REQUEST = range(400, 500)


@dataclass(frozen=True)
class Refusal:
    """An error that a server answered with. parameter: the field at fault."""

    status: int
    message: str
    parameter: str | None = None

    @classmethod
    def read(cls, status: int, content: bytes) -> Refusal:
        """vLLM's nested form, the flat one of older builds, or whatever else it is."""
        try:
            document = json.loads(content)
        except ValueError:
            return cls(status, content[:_SHOWN].decode(errors="replace") or f"HTTP {status}")
        return cls.of(document, status)

    @classmethod
    def of(cls, document: object, status: int = 500) -> Refusal:
        """From a body, or an event of a stream, that holds an error."""
        told = document.get("error", document) if isinstance(document, Mapping) else document
        if not isinstance(told, Mapping):
            return cls(status, str(told)[:_SHOWN])
        code, parameter = told.get("code"), told.get("param")
        return cls(
            code if isinstance(code, int) and 400 <= code < 600 else status,
            str(told.get("message") or told.get("detail") or f"HTTP {status}")[:_SHOWN],
            parameter if isinstance(parameter, str) else None,
        )

    @property
    def is_of_a_module(self) -> bool:
        """Whether the server has not got a module, or could not load it."""
        return self.status in (400, 404) and self.parameter == "model"

    @property
    def is_of_the_request(self) -> bool:
        """Whether every server would say the same."""
        elsewhere = (401, 403, 404, 408, 429)
        return self.status in _FAULTS_OF_THE_REQUEST and self.status not in elsewhere

    @property
    def is_of_the_server(self) -> bool:
        """Whether it tells that something is wrong with the server."""
        return self.status in (401, 403, 404) or self.status >= 500

    @property
    def error(self) -> MergerouteError:
        """As an error of ours."""
        if self.is_of_a_module:
            return ModuleUnavailableError(f"no vLLM server serves the blend: {self.message}")
        if self.is_of_the_request:
            kind = ContextLengthError if _TOO_LONG.search(self.message) else RequestError
            return kind(self.message, parameter=self.parameter)
        if self.status == 429:
            return QueueFullError(f"the vLLM server is full: {self.message}")
        if self.status in (408, 503):
            return EngineStoppedError(f"the vLLM server is not ready: {self.message}")
        return EngineError(f"the vLLM server failed (HTTP {self.status}): {self.message}")
