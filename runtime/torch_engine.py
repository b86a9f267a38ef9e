"""TorchEngine: one packed batch per step on one device, CPU or GPU."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
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
from .blended import BlendPlan, ModuleStack, blending
from .compatibility import prepare_model
from .detokenize import TextStream
from .encoder import Encoder
from .engine import EngineStats, Generation
from .loading import (
    choose_device,
    choose_dtype,
    context_length,
    end_tokens,
    load_model,
    load_tokenizer,
)
from .packing import blend_segments, pack, pad_rows
from .prefix_cache import Reuse
from .sampling import Sampled, SamplingState, sample
from .scheduler import Chunk, Scheduler, Sequence
from .types import FinishReason, GenerationRequest, TokenEvent

logger = logging.getLogger(__name__)

_IDLE_S = 0.5


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

    The model becomes the engine's own: its attention and linear layers are replaced.
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
        self._encoders: dict[int, Encoder] = {}
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

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot run; errors as in `Engine.check`."""
        self._admission.check(request)

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request into the running batch; errors as in `Engine.submit`."""
        limit = self._admission.check(request)
        sampling = request.sampling
        sequence = Sequence(
            generation=Generation(),
            blend=request.blend,
            sampling=SamplingState(sampling, list(request.prompt_ids), len(request.prompt_ids)),
            limit=limit,
            end_tokens=frozenset(sampling.stop_token_ids)
            | (frozenset() if sampling.ignore_eos else self._eos),
            text=TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None,
        )
        with self._lock:
            if self._is_stopping:
                raise EngineStoppedError("the engine is shutting down: try another replica")
            for digest in request.blend:
                if not self._loads[digest]:
                    raise UnknownModuleError(f"module {digest} is not loaded: load it first")
            self._scheduler.add(sequence)
            self._users.update(request.blend.keys())
        self._wake.set()
        return sequence.generation

    def load_module(self, module: Module) -> str:
        """Make a module resident while requests run; returns its digest. Loads are counted."""
        module.check(self._stack.shapes)
        digest = module.digest
        self._between_steps(lambda: self._load(module, digest))
        return digest

    def unload_module(self, digest: str) -> None:
        """Undo one load; requests that run on the module keep it until they end."""
        self._between_steps(lambda: self._unload(digest))

    def encode(self, prompt_ids: tuple[int, ...], layer: int) -> Tensor:
        """Hidden states after the backbone's first `layer` layers, [t, hidden], float32."""
        with self._encoding:
            if layer not in self._encoders:
                self._encoders[layer] = Encoder(self.model, layer=layer)
            return self._encoders[layer].encode(prompt_ids)

    def stats(self) -> EngineStats:
        """Counters and load."""
        return replace(
            self._stats,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            modules=len(self._stack),
        )

    def stop(self) -> None:
        """End every generation as cancelled and wait for the loop to finish."""
        with self._lock:
            self._is_stopping = True
        self._wake.set()
        self._thread.join()

    # The engine's thread: everything below runs there.

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._is_stopping:
            self._run_tasks()
            if not (self._scheduler.running or self._scheduler.waiting):
                self._wake.wait(_IDLE_S)
                self._wake.clear()
                continue
            try:
                self._step()
            except Exception as error:
                logger.exception("a step failed outside any request")
                for sequence in self._unfinished():
                    self._fail(sequence, f"the engine failed: {error}")
        for sequence in self._unfinished():
            self._finish(sequence, TokenEvent(finish_reason=FinishReason.CANCELLED))
        self._run_tasks()

    def _step(self) -> None:
        """One forward for everything that runs; if it fails, each sequence is tried alone, so that
        the one at fault ends and its neighbours go on.
        """
        for sequence in self._unfinished():
            if sequence.generation.is_cancelled:
                self._finish(sequence, TokenEvent(finish_reason=FinishReason.CANCELLED))
        self._scheduler.admit(self._prepare)
        chunks = self._scheduler.plan()
        try:
            self._forward(chunks)
        except Exception as error:
            if len(chunks) > 1:
                logger.warning("a step failed and is repeated one by one: %s", error)
            for chunk in chunks:
                self._forward_alone(chunk)

    def _unfinished(self) -> list[Sequence]:
        with self._lock:
            return [*self._scheduler.running, *self._scheduler.waiting]

    def _forward_alone(self, chunk: Chunk) -> None:
        try:
            self._forward([chunk])
        except Exception as error:
            logger.exception("a request failed")
            self._fail(chunk.sequence, f"the engine failed on this request: {error}")

    def _prepare(self, sequence: Sequence, reuse: Reuse) -> None:
        """Ready a sequence that was given a slot: copy the prefix it reuses, expand its gates."""
        if reuse.source != reuse.slot:
            self._cache.copy_prefix(reuse.source, reuse.slot, reuse.length)
        sequence.generation.cached_tokens = reuse.length
        self._count(reused_tokens=reuse.length, prompt_tokens=len(sequence.tokens))

    def _forward(self, chunks: list[Chunk]) -> None:
        """Run the model over the chunks, sample where a chunk ends its sequence, and tell. Nothing
        is changed before both have succeeded.
        """
        if not chunks:
            return
        sampled = self._compute(chunks)
        self._count(steps=1)
        for chunk in chunks:
            is_last = chunk.is_last
            self._scheduler.advance(chunk)
            if is_last:
                self._deliver(chunk.sequence, sampled[chunk.sequence])

    def _compute(self, chunks: list[Chunk]) -> dict[Sequence, Sampled | None]:
        spans, ids, last_rows = pack(chunks)
        device = self.model.device
        batch = PackedBatch(spans, device=device, cache=self._cache)
        inputs = {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": batch.positions[None],
            "use_cache": False,
        }
        with packed(batch), blending(self._blend_plan(chunks)):
            if not last_rows:
                self.model.base_model(**inputs)
                return {}
            keep = torch.tensor(pad_rows(last_rows), device=device)
            logits = self.model(**inputs, logits_to_keep=keep).logits[0, : len(last_rows)]
        ends = [chunk.sequence for chunk in chunks if chunk.is_last]
        return dict(zip(ends, sample(logits, [s.sampling for s in ends]), strict=True))

    def _blend_plan(self, chunks: list[Chunk]) -> BlendPlan | None:
        """Gates per row, and segments: decodes together, every prompt with its own modules."""
        if not any(chunk.sequence.blend for chunk in chunks):
            return None
        gates = torch.stack([self._gates(chunk.sequence) for chunk in chunks])
        counts = torch.tensor([chunk.count for chunk in chunks], device=gates.device)
        return BlendPlan(gates.repeat_interleave(counts, 0), blend_segments(chunks, self._stack))

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
        except Exception as error:
            logger.exception("a token could not be decoded")
            self._fail(sequence, f"token {sampled.token_id} could not be decoded: {error}")
            return
        if event.finish_reason:
            self._finish(sequence, event)
        else:
            sequence.generation.deliver(event)

    def _fail(self, sequence: Sequence, message: str) -> None:
        self._finish(sequence, TokenEvent(finish_reason=FinishReason.ERROR, error=message))

    def _finish(self, sequence: Sequence, event: TokenEvent) -> None:
        """Free what the sequence held, then deliver its last event."""
        try:
            with self._lock:
                self._scheduler.remove(sequence)
                self._users.subtract(sequence.blend.keys())
            for digest in sequence.blend:
                self._evict_if_unused(digest)
        finally:
            sequence.generation.deliver(event)

    def _load(self, module: Module, digest: str) -> None:
        if digest not in self._stack:
            self._stack.add(module)
        with self._lock:
            self._loads[digest] += 1

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
