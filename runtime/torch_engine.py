"""TorchEngine: one packed batch per step on one device, CPU or GPU."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..adapters.errors import (
    EngineError,
    EngineStoppedError,
    UnknownModuleError,
)
from ..adapters.lora import Module
from .admission import Admission
from .attention import KVCache, PackedBatch, packed
from .blending import BlendPlan, blending
from .compatibility import prepare_model
from .detokenize import TextStream
from .directions import GateTables
from .encoder import Encoder
from .engine import EngineStats, Generation
from .gating import GateTable, Smoother
from .loading import (
    choose_device,
    choose_dtype,
    context_length,
    end_tokens,
    load_model,
    load_tokenizer,
)
from .module_stack import ModuleStack, PreparedModule, ResidentModule
from .packing import blend_plan, pack, pad_rows
from .prefix_cache import Reuse
from .sampling import Sampled, SamplingState, sample
from .scheduler import Chunk, Scheduler, Sequence
from .types import FinishReason, GenerationRequest, TokenEvent, TokenGate

logger = logging.getLogger(__name__)

_IDLE_S = 0.5
_FAILED = "the engine failed on this request: the server's log says why"
_Samples = dict[Sequence, Sampled | None]


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    max_length: most tokens of prompt and completion; None takes the model's, at most 4,096.
    max_concurrency: most requests that run at once. token_budget: most tokens in one forward.
    max_waiting: most requests that wait.
    """

    max_length: int | None = None
    max_concurrency: int = 16
    token_budget: int = 512
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_concurrency", "token_budget", "max_waiting"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}, at least 1 is needed")
        if self.token_budget < self.max_concurrency:
            raise EngineError(
                f"token_budget {self.token_budget} is below max_concurrency "
                f"{self.max_concurrency}: every running request needs a token per step"
            )


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
        options: EngineOptions = EngineOptions(),
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._admission = Admission(
            max_length=context_length(model.config, options.max_length),
            vocabulary=model.config.get_text_config().vocab_size,
            has_tokenizer=tokenizer is not None,
        )
        self._eos = end_tokens(model)
        prepare_model(model)
        self._stack = ModuleStack(model)
        self._tables = GateTables(self._resident, device=model.device)
        self._encoders: dict[tuple[int, ...], Encoder] = {}
        self._cache = KVCache(options.max_concurrency, self.max_length)
        self._scheduler = Scheduler(
            slots=options.max_concurrency,
            token_budget=options.token_budget,
            max_waiting=options.max_waiting,
        )
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self._loads: Counter[str] = Counter()
        self._users: Counter[str] = Counter()
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stats = EngineStats()
        self._wake = threading.Event()
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
        options: EngineOptions = EngineOptions(),
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
        sampling, gate = request.sampling, request.gate
        sequence = Sequence(
            generation=Generation(),
            blend=request.blend,
            sampling=SamplingState(sampling, list(request.prompt_ids), len(request.prompt_ids)),
            limit=limit,
            end_tokens=frozenset(sampling.stop_token_ids)
            | (frozenset() if sampling.ignore_eos else self._eos),
            text=TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None,
            table=self._table(gate) if gate else None,
            smoother=Smoother() if gate and gate.routing.smoothing else None,
        )
        with self._lock:
            if self._is_stopping:
                raise EngineStoppedError("the engine is shutting down: try another replica")
            for digest in sequence.digests:
                self._check_loaded(digest)
            self._scheduler.add(sequence)
            self._users.update(sequence.digests)
        self._wake.set()
        return sequence.generation

    def prepare_gate(self, gate: TokenGate) -> None:
        """Compute what a gate needs of its modules; see `Engine.prepare_gate`."""
        self._table(gate)

    def load_module(self, module: Module) -> str:
        """Make a module resident while requests run; returns its digest. Loads are counted."""
        prepared = self._stack.prepare(module)
        self._between_steps(lambda: self._load(prepared))
        return prepared.digest

    def unload_module(self, digest: str) -> None:
        """Undo one load; requests that run on the module keep it until they end."""
        self._between_steps(lambda: self._unload(digest))

    def encode(self, prompts: Items[tuple[int, ...]], layers: Items[int]) -> list[Tensor]:
        """Hidden states after layers of the backbone; see `Engine.encode`."""
        key = tuple(layers)
        with self._encoding:
            if key not in self._encoders:
                self._encoders[key] = Encoder(self.model, layers=key)
            return self._encoders[key].encode(prompts)

    def stats(self) -> EngineStats:
        """Counters and load."""
        return replace(
            self._stats,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            modules=len(self._stack),
        )

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and not self._is_stopping

    def stop(self) -> None:
        """End every generation as cancelled and wait for the loop to finish."""
        with self._lock:
            self._is_stopping = True
        self._wake.set()
        self._thread.join()

    def _check_loaded(self, digest: str) -> None:
        if not self._loads[digest]:
            raise UnknownModuleError(f"module {digest} is not loaded: load it first")

    def _table(self, gate: TokenGate) -> GateTable:
        """A gate's table; modules that were evicted meanwhile leave nothing behind."""
        table = self._tables.table(gate)
        with self._lock:
            gone = [d for d in gate.modules if not self._loads[d] and not self._users[d]]
        for digest in gone:
            self._tables.forget(digest)
        return table

    def _resident(self, digest: str) -> ResidentModule:
        """A copy of what is resident of a module, taken between two steps."""
        found: list[ResidentModule] = []
        self._between_steps(lambda: found.append(self._stack.resident(digest)))
        return found[0]

    # The engine's thread: everything below runs there.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._run_tasks()
                if self._scheduler.running or self._scheduler.waiting:
                    self._step()
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
        for sequence in self._unfinished():
            self._finish(sequence, TokenEvent(finish_reason=FinishReason.CANCELLED))
        self._run_tasks()

    def _step(self) -> None:
        """One forward for everything that runs, then its tokens."""
        for sequence in self._unfinished():
            if sequence.generation.is_cancelled:
                self._finish(sequence, TokenEvent(finish_reason=FinishReason.CANCELLED))
        self._scheduler.admit(self._prepare)
        if chunks := self._scheduler.plan():
            for computed, sampled in self._computed(chunks):
                self._advance(computed, sampled)

    def _unfinished(self) -> list[Sequence]:
        with self._lock:
            return [*self._scheduler.running, *self._scheduler.waiting]

    def _prepare(self, sequence: Sequence, reuse: Reuse) -> None:
        """Ready a sequence that was given a slot: copy the prefix it reuses."""
        try:
            if reuse.source != reuse.slot:
                self._cache.copy_prefix(reuse.source, reuse.slot, reuse.length)
        except Exception:
            self._fail(sequence, _FAILED)
            return
        self._scheduler.prefixes.contents[reuse.slot].valid = reuse.length
        sequence.generation.cached_tokens = reuse.length
        self._count(reused_tokens=reuse.length, prompt_tokens=len(sequence.tokens))

    def _computed(self, chunks: list[Chunk]) -> list[tuple[list[Chunk], _Samples]]:
        """The chunks with what was sampled. When a forward fails each chunk is tried alone, so that
        the one at fault ends and its neighbours go on; computing changes nothing else.
        """
        try:
            return [(chunks, self._compute(chunks))]
        except Exception:
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, _FAILED)
                return []
        return [result for chunk in chunks for result in self._computed([chunk])]

    def _advance(self, chunks: list[Chunk], sampled: _Samples) -> None:
        """The chunks are in the cache: tell of the tokens that were sampled."""
        self._count(steps=1)
        for chunk in chunks:
            is_last = chunk.is_last
            self._scheduler.advance(chunk)
            if is_last:
                self._deliver(chunk.sequence, sampled[chunk.sequence])

    def _compute(self, chunks: list[Chunk]) -> _Samples:
        spans, ids, last_rows = pack(chunks)
        device = self.model.device
        batch = PackedBatch(spans, device=device, cache=self._cache)
        inputs = {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": batch.positions[None],
            "use_cache": False,
        }
        kept_rows = pad_rows(last_rows)
        with packed(batch), blending(self._blend_plan(chunks, kept_rows)):
            if not last_rows:
                self.model.base_model(**inputs)
                return {}
            keep = torch.tensor(kept_rows, device=device)
            logits = self.model(**inputs, logits_to_keep=keep).logits[0, : len(last_rows)]
        ends = [chunk.sequence for chunk in chunks if chunk.is_last]
        return dict(zip(ends, sample(logits, [s.sampling for s in ends]), strict=True))

    def _blend_plan(self, chunks: list[Chunk], kept_rows: list[int]) -> BlendPlan | None:
        """Gates per row, and segments; see `blend_plan`."""
        if not any(chunk.sequence.digests for chunk in chunks):
            return None
        gates = torch.stack([self._gates(chunk.sequence) for chunk in chunks])
        counts = torch.tensor([chunk.count for chunk in chunks], device=gates.device)
        return blend_plan(chunks, gates.repeat_interleave(counts, 0), self._stack, kept_rows)

    def _gates(self, sequence: Sequence) -> Tensor:
        """The sequence's gates, [R]; R changes when modules come and go."""
        if sequence.gates is None or sequence.gates.shape[0] != self._stack.ranks:
            sequence.gates = self._stack.gates(sequence.blend)
        return sequence.gates

    def _deliver(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """Append a sampled token, and tell the caller."""
        if sampled is None:
            self._fail(sequence, "the logits hold NaN or inf: the blend's weights are too large")
            return
        sequence.tokens.append(sampled.token_id)
        sequence.generated += 1
        self._count(generated_tokens=1)
        try:
            event = _event(sequence, sampled)
        except Exception:
            self._fail(sequence, _FAILED)
            return
        if event.finish_reason:
            self._finish(sequence, event)
        else:
            sequence.generation.deliver(event)

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End a sequence with an error; inside an except block, the log says which."""
        logger.error("a request failed: %s", message, exc_info=sys.exc_info()[0] is not None)
        self._finish(sequence, TokenEvent(finish_reason=FinishReason.ERROR, error=message))

    def _finish(self, sequence: Sequence, event: TokenEvent) -> None:
        """Free what the sequence held, then deliver its last event."""
        if sequence.is_over:
            return
        sequence.is_over = True
        with self._lock:
            self._scheduler.remove(sequence)
            self._users.subtract(sequence.digests)
        try:
            for digest in sequence.digests:
                self._evict_if_unused(digest)
        finally:
            sequence.generation.deliver(event)

    def _load(self, prepared: PreparedModule) -> None:
        if prepared.digest not in self._stack:
            self._stack.add(prepared)
        with self._lock:
            self._loads[prepared.digest] += 1

    def _unload(self, digest: str) -> None:
        with self._lock:
            if not self._loads[digest]:
                raise UnknownModuleError(f"module {digest} is not loaded")
            self._loads[digest] -= 1
        self._evict_if_unused(digest)

    def _evict_if_unused(self, digest: str) -> None:
        with self._lock:
            is_used = self._loads[digest] > 0 or self._users[digest] > 0
            if not is_used:
                del self._loads[digest], self._users[digest]
        if not is_used:
            self._stack.remove(digest)
            self._tables.forget(digest)

    def _between_steps(self, task: Callable[[], None]) -> None:
        """Run a task on the engine's thread between two steps, and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                task()
            except Exception as error:  # whatever it is, the caller waits for it
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            if self._is_stopping:
                raise EngineStoppedError("the engine is shutting down")
            self._tasks.put(run)
        self._wake.set()
        done.result()

    def _run_tasks(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            task()

    def _count(self, **increments: int) -> None:
        current = self._stats
        self._stats = replace(
            current, **{name: getattr(current, name) + by for name, by in increments.items()}
        )


def _event(sequence: Sequence, sampled: Sampled) -> TokenEvent:
    """What to tell of a token that was appended; an end token shows neither text nor logprob."""
    token, text = sampled.token_id, sequence.text
    if token in sequence.end_tokens:
        shown = text.flush() if text else ""
        return TokenEvent(token, shown, finish_reason=FinishReason.STOP)
    shown = text.push(token) if text else ""
    reason = None
    if text and text.is_stopped:
        reason = FinishReason.STOP
    elif sequence.generated >= sequence.limit:
        shown += text.flush() if text else ""
        reason = FinishReason.LENGTH
    return TokenEvent(token, shown, sampled.logprob, sampled.top_logprobs, reason)
