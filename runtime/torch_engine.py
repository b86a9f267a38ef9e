"""TorchEngine: one packed batch per step on one device, CPU or GPU."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.errors import EngineStoppedError
from ..adapters.lora import Module
from .admission import Admission
from .attention import KVCache
from .compatibility import prepare_model
from .detokenize import TextStream
from .encoder import Encoder
from .engine import EngineStats, Generation
from .engine_modules import EngineModules
from .forward import Forward
from .gating import Smoother
from .grammar import Grammars
from .loading import (
    choose_device,
    choose_dtype,
    context_length,
    end_tokens,
    load_model,
    load_tokenizer,
)
from .options import DEFAULT_OPTIONS, EngineOptions
from .sampling import SamplingState
from .scheduler import Scheduler, Sequence
from .steps import Steps
from .tasks import Tasks
from .types import GenerationRequest, Grammar, TokenGate

logger = logging.getLogger(__name__)

_IDLE_S = 0.5


class TorchEngine:
    """Continuous batching over a transformers model, exact for any mix of blends.

    The model becomes the engine's own: its attention is replaced, and so is every layer that a
    module changes.
    Use it as a context manager, or call `stop`.

    tokenizer: a fast tokenizer; without one, events carry no text and stop texts are refused.

    Raises:
        UnsupportedModelError: the architecture cannot be served exactly.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        *,
        tokenizer: Any = None,  # noqa: ANN401
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.options = options
        self._admission = Admission(
            max_length=context_length(model.config, options.max_length),
            vocabulary=model.config.get_text_config().vocab_size,
            has_tokenizer=tokenizer is not None,
        )
        self._eos = end_tokens(model)
        prepare_model(model)
        self._grammars = Grammars(tokenizer, self._eos)
        self._encoders: dict[tuple[int, ...], Encoder] = {}
        self._scheduler = Scheduler(
            slots=options.max_concurrency,
            token_budget=options.token_budget,
            max_waiting=options.max_waiting,
        )
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self._wake = threading.Event()
        self._tasks = Tasks(self._wake)
        self.modules = EngineModules(
            model, options.module_bytes, lock=self._lock, tasks=self._tasks
        )
        self._forward = Forward(
            model, self.modules.stack, KVCache(options.max_concurrency, self.max_length)
        )
        self._steps = Steps(self._scheduler, self._forward, modules=self.modules, lock=self._lock)
        self._beat = time.monotonic()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="mergeroute-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> TorchEngine:
        """Load a checkpoint folder; for `device` and `dtype` see `choose_device`, `choose_dtype`.

        Raises:
            UnsupportedModelError: it cannot be loaded or served.
            EngineError: no such device or dtype.
        """
        place = choose_device(device)
        model = load_model(path, device=place, dtype=choose_dtype(dtype, place))
        return cls(model, tokenizer=load_tokenizer(path), options=options)

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._admission.max_length

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self._admission.vocabulary

    @property
    def width(self) -> int:
        """Of hidden states."""
        width: int = self.model.config.get_text_config().hidden_size
        return width

    @property
    def layers(self) -> int:
        """How many layers the backbone has."""
        count: int = self.model.config.get_text_config().num_hidden_layers
        return count

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot run; errors as in `Engine.check`."""
        self._admission.check(request)

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request into the running batch; errors as in `Engine.submit`."""
        limit = self._admission.check(request)
        sampling, gate, grammar = request.sampling, request.gate, request.grammar
        end_tokens = frozenset(sampling.stop_token_ids)
        end_tokens |= frozenset() if sampling.ignore_eos else self._eos
        sequence = Sequence(
            generation=Generation(),
            blend=request.blend,
            sampling=SamplingState(
                sampling,
                list(request.prompt_ids),
                len(request.prompt_ids),
                end_tokens,
                self._grammars.constraint(grammar) if grammar else None,
            ),
            limit=limit,
            end_tokens=end_tokens,
            text=TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None,
            table=self.modules.table(gate) if gate else None,
            smoother=Smoother() if gate and gate.routing.smoothing else None,
            tenant=request.tenant,
            deadline=request.deadline,
        )
        with self._lock:
            if self._is_stopping:
                raise EngineStoppedError("the engine is shutting down: try another replica")
            self.modules.check_loaded(sequence.digests)
            self._scheduler.add(sequence)
            self.modules.begin_use(sequence.digests)
        self._wake.set()
        return sequence.generation

    def prepare_gate(self, gate: TokenGate) -> None:
        """Compute what a gate needs of its modules; see `Engine.prepare_gate`."""
        self.modules.table(gate)

    def prepare_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar; see `Engine.prepare_grammar`."""
        self._grammars.constraint(grammar)

    def load_module(self, module: Module) -> str:
        """Make a module resident while requests run; returns its digest. Loads are counted."""
        prepared = self.modules.prepare(module)
        self.modules.put(prepared)
        return prepared.digest

    def unload_module(self, digest: str) -> None:
        """Undo one load; requests that run on the module keep it until they end."""
        self.modules.drop(digest).result()

    def encode(self, prompts: Items[tuple[int, ...]], layers: Items[int]) -> list[Tensor]:
        """Hidden states after layers of the backbone; see `Engine.encode`."""
        with self._encoding:
            return self._encoder(tuple(layers)).encode(prompts)

    def embed(self, prompts: Items[tuple[int, ...]]) -> Tensor:
        """Mean hidden states of prompts after the backbone's final norm, [n, hidden], float32."""
        with self._encoding:
            return self._encoder((self.layers,)).embed(prompts)

    def _encoder(self, layers: tuple[int, ...]) -> Encoder:
        if layers not in self._encoders:
            self._encoders[layers] = Encoder(self.model, layers=layers)
        return self._encoders[layers]

    def stats(self) -> EngineStats:
        """Counters and load."""
        return replace(
            self._steps.counts,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            modules=len(self.modules.stack),
            silent_s=time.monotonic() - self._beat,
            slots=self.options.max_concurrency,
        )

    def modules_asked(self) -> tuple[frozenset[str], frozenset[str]]:
        """Digests of the modules of running requests, and of those that wait for a slot."""
        unfinished = self._steps.unfinished()
        running = [s.digests for s in unfinished if s.slot is not None]
        waiting = [s.digests for s in unfinished if s.slot is None]
        return frozenset().union(*running), frozenset().union(*waiting)

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and not self._is_stopping

    def ailment(self, watchdog_s: float) -> str | None:
        """Why it cannot be relied on now; see `Engine.ailment`."""
        if not self.is_running:
            return "an engine has stopped: restart the server"
        silent_s = self.stats().silent_s
        if silent_s > watchdog_s:
            return (
                f"an engine has been in one step for {silent_s:.0f} s, the limit is "
                f"{watchdog_s:g} s (pressure.watchdog_seconds): wait, or restart the server"
            )
        return None

    def stop(self) -> None:
        """End every generation as cancelled and wait for the loop to finish."""
        with self._lock:
            self._is_stopping = True
        self._tasks.close()
        self._wake.set()
        self._thread.join()

    # The engine's thread: everything below runs there.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._beat = time.monotonic()
                self._tasks.run()
                if self._scheduler.running or self._scheduler.waiting:
                    self._steps.step()
                else:
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
        except Exception:
            logger.exception("the engine's loop failed: it stops")
        finally:
            self._shut_down()

    def _shut_down(self) -> None:
        """Accept nothing more, and end what is unfinished."""
        with self._lock:
            self._is_stopping = True
        self._tasks.close()
        self._steps.cancel_all()
        self._tasks.run()
