"""BlendAdmission: inside vLLM's API server, tells which blends can be asked for.

vLLM's own way keeps every name that was ever asked for, asks the workers for each, and opens routes
that load files; here names are read, and workers are asked only for modules that they may lack.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from http import HTTPStatus
from typing import Any

from vllm.lora.request import LoRARequest

from ...adapters.blend import Blend
from ...adapters.errors import BlendError
from .blends import VIRTUAL_PATH, read_name
from .store import ModuleStore

_MOST_NAMES = 1 << 16


class BlendAdmission:
    """The blends of one API server. Used from its event loop alone.

    models: vLLM's OpenAIServingModels, for its engine and its numbers.
    """

    def __init__(self, models: Any, store: ModuleStore) -> None:  # noqa: ANN401
        self._models = models
        self._store = store
        self._requests: OrderedDict[str, LoRARequest] = OrderedDict()
        self._loaded: set[str] = set()  # what all workers are known to have loaded
        self._loading = asyncio.Lock()

    async def check(self, name: str) -> Any:  # noqa: ANN401
        """vLLM's error for a blend that cannot be served; None: it can be asked for."""
        try:
            blend = read_name(name)
        except BlendError as error:
            return _error(HTTPStatus.BAD_REQUEST, "BadRequestError", str(error))
        if missing := sorted(key for key in blend if key not in self._store):
            return _error(
                HTTPStatus.NOT_FOUND,
                "NotFoundError",
                f"{name!r} names modules that are not registered: {', '.join(missing)}",
            )
        request = self._request(name)
        if blend.keys() <= self._loaded:
            return None
        return await self._load(request, blend)

    def request(self, name: str) -> LoRARequest:
        """The LoRA request of a blend that was checked."""
        return self._requests[name]

    async def _load(self, request: LoRARequest, blend: Blend) -> Any:  # noqa: ANN401
        """Have all workers load what they lack, and drop what went, should they need the room."""
        async with self._loading:
            kept = self._store.keys() | self._in_use()
            control = LoRARequest(request.lora_name, request.lora_int_id, ",".join(sorted(kept)))
            self._loaded &= kept  # workers may drop the others, even where they fail then
            try:
                await self._models.engine_client.add_lora(control)
            except Exception as error:  # whatever a worker raised comes back as text
                return _error(HTTPStatus.BAD_REQUEST, "BadRequestError", _told(error))
            self._loaded |= set(blend)
            return None

    def _request(self, name: str) -> LoRARequest:
        """One request object a name for as long as it is in use: vLLM tells blends apart by name in
        some places and by number in others.
        """
        if name not in self._requests:
            if len(self._requests) >= _MOST_NAMES:
                self._forget()
            number = self._models.lora_id_counter.inc(1)
            self._requests[name] = LoRARequest(name, number, VIRTUAL_PATH)
        self._requests.move_to_end(name)
        return self._requests[name]

    def _forget(self) -> None:
        """The older half of the names, but for those in use."""
        running = self._running()
        for name in list(self._requests)[: _MOST_NAMES // 2]:
            if name not in running:
                del self._requests[name]

    def _in_use(self) -> set[str]:
        return {key for name in self._running() for key in read_name(name)}

    def _running(self) -> set[str]:
        states = self._models.engine_client.output_processor.request_states.values()
        return {state.lora_name for state in states if state.lora_name is not None}


def _told(error: Exception) -> str:
    """The last line of a failure that crossed processes: what was raised, not where."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _error(status: HTTPStatus, kind: str, message: str) -> Any:  # noqa: ANN401
    from vllm.entrypoints.serve import create_error_response

    return create_error_response(message, err_type=kind, status_code=status, param="model")
