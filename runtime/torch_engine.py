"""TorchEngine: one packed batch per step on one device, CPU or GPU."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
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
from .footprint import Room
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
from .module_stack import ModuleStack, PreparedModule, ResidentModule
from .packing import blend_plan, last_rows, pack, pad_rows
from .prefix_cache import Reuse
from .prompt_logprobs import Scores, prompt_scores
from .sampling import Sampled, SamplingState, sample
from .scheduler import Chunk, Scheduler, Sequence
from .types import FinishReason, GenerationRequest, Grammar, TokenEvent, TokenGate

logger = logging.getLogger(__name__)

_IDLE_S = 0.5
_FAILED = "the engine failed on this request: the server's log says why"
_UNSOUND = "the logits hold NaN or inf: the blend's weights are too large"


@dataclass(frozen=True)
class _Computed:
    """What a forward gave. samples: of sequences whose last chunk it held."""

    chunks: list[Chunk]
    samples: dict[Sequence, Sampled | None] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    def is_sound(self, chunk: Chunk) -> bool:
        """Whether the logits that a chunk was asked for are numbers."""
        unsampled = chunk.is_last and self.samples[chunk.sequence] is None
        return not unsampled and self.scores.get(chunk.sequence, []) is not None


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


class TorchEngine:
    """Continuous batching over a transformers model, exact for any mix of blends.

    The model becomes the engine's own: its attention is replaced, and so is every layer that a
    module changes.
    Use it as a context manager, or call `stop`.

    on_idle: called from the engine's thread when a request has ended that ran on modules.
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
        self.options = options
        self.on_idle: Callable[[], None] = lambda: None
        self._admission = Admission(
            max_length=context_length(model.config, options.max_length),
            vocabulary=model.config.get_text_config().vocab_size,
            has_tokenizer=tokenizer is not None,
        )
        self._eos = end_tokens(model)
        prepare_model(model)
        self._stack = ModuleStack(model, options.module_bytes)
        self._tables = GateTables(self._resident, device=model.device)
        self._grammars = Grammars(tokenizer, self._eos)
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
        self._beat = time.monotonic()
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
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self._admission.vocabulary

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
            table=self._tables.table(gate) if gate else None,
            smoother=Smoother() if gate and gate.routing.smoothing else None,
            tenant=request.tenant,
            deadline=request.deadline,
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
        self._tables.table(gate)

    def prepare_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar; see `Engine.prepare_grammar`."""
        self._grammars.constraint(grammar)

    def load_module(self, module: Module) -> str:
        """Make a module resident while requests run; returns its digest. Loads are counted."""
        prepared = self.prepare_module(module)
        self.put_module(prepared)
        return prepared.digest

    def unload_module(self, digest: str) -> None:
        """Undo one load; requests that run on the module keep it until they end."""
        self.drop_module(digest).result()

    @property
    def room(self) -> Room:
        """The memory that modules may take."""
        return self._stack.room

    def prepare_module(self, module: Module) -> PreparedModule:
        """Check a module and make it ready to be put in, in the caller's thread.

        Raises:
            ModuleError: it does not fit the backbone.
        """
        return self._stack.prepare(module)

    def put_module(self, prepared: PreparedModule) -> None:
        """The second half of `load_module`: between two steps it is only copied.

        Raises:
            EngineError: there is no room.
        """
        staged = prepared.to(self.model.device)
        self._between_steps(lambda: self._load(staged))

    def drop_module(self, digest: str) -> Future[None]:
        """As `unload_module`, before whatever is put in or dropped later, without waiting."""
        return self._soon(lambda: self._unload(digest))

    def uses_module(self, digest: str) -> bool:
        """Whether a request that runs or waits needs the module."""
        with self._lock:
            return self._users[digest] > 0

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
            self._stats,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            modules=len(self._stack),
            silent_s=time.monotonic() - self._beat,
            slots=self.options.max_concurrency,
        )

    def modules_asked(self) -> tuple[frozenset[str], frozenset[str]]:
        """Digests of the modules of running requests, and of those that wait for a slot."""
        unfinished = self._unfinished()
        running = [s.digests for s in unfinished if s.slot is not None]
        waiting = [s.digests for s in unfinished if s.slot is None]
        return frozenset().union(*running), frozenset().union(*waiting)

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

    def _resident(self, digest: str) -> ResidentModule:
        """A copy of what is resident of a module, taken between two steps."""
        with self._lock:
            self._check_loaded(digest)  # nobody waits for a step to be told so
        found: list[ResidentModule] = []
        self._between_steps(lambda: found.append(self._stack.resident(digest)))
        return found[0]

    # The engine's thread: everything below runs there.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._beat = time.monotonic()
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
            elif sequence.is_late:
                self._finish(sequence, TokenEvent(finish_reason=FinishReason.TIMEOUT))
        self._scheduler.admit(self._prepare)
        if chunks := self._scheduler.plan():
            for computed in self._computed(chunks):
                self._advance(computed)

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
        sequence.generation.admitted_at = time.perf_counter()
        self._count(
            admitted=1,
            reused=int(reuse.length > 0),
            reused_tokens=reuse.length,
            prompt_tokens=len(sequence.tokens),
        )

    def _computed(self, chunks: list[Chunk]) -> list[_Computed]:
        """The chunks with what was sampled. When a forward fails each chunk is tried alone, and so
        is each whose logits are no numbers: decodes share products with their neighbours' modules,
        which may overflow in a half type. So the one at fault ends and its neighbours go on;
        computing changes nothing else.
        """
        try:
            computed = self._compute(chunks)
            sound = [chunk for chunk in chunks if computed.is_sound(chunk)]
        except Exception:
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, _FAILED)
                return []
            computed, sound = _Computed([]), []
        if len(chunks) == 1 or len(sound) == len(chunks):
            return [computed]
        alone = [chunk for chunk in chunks if chunk not in sound]
        rest = [result for chunk in alone for result in self._computed([chunk])]
        return [replace(computed, chunks=sound), *rest]

    def _advance(self, computed: _Computed) -> None:
        """The chunks are in the cache: tell of the tokens that were sampled."""
        self._count(steps=1, rows=len(computed.chunks))
        for chunk in computed.chunks:
            is_last, sequence = chunk.is_last, chunk.sequence
            self._scheduler.advance(chunk)
            scores = computed.scores.get(sequence, [])
            if scores is None:
                self._fail(sequence, _UNSOUND)
                continue
            sequence.generation.prompt_scores += scores
            if is_last:
                self._deliver(sequence, computed.samples[sequence])

    def _compute(self, chunks: list[Chunk]) -> _Computed:
        spans, ids, asked_rows = pack(chunks)
        device = self.model.device
        batch = PackedBatch(spans, device=device, cache=self._cache)
        inputs = {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": batch.positions[None],
            "use_cache": False,
        }
        kept_rows = pad_rows(asked_rows)
        with packed(batch), blending(self._blend_plan(chunks, kept_rows)):
            if not asked_rows:
                self.model.base_model(**inputs)
                return _Computed(chunks)
            keep = torch.tensor(kept_rows, device=device)
            logits = self.model(**inputs, logits_to_keep=keep).logits[0, : len(asked_rows)]
        scores = prompt_scores(chunks, logits)
        ends = [chunk.sequence for chunk in chunks if chunk.is_last]
        if scores:
            logits = logits[last_rows(chunks)]
        sampled = sample(logits, [s.sampling for s in ends]) if ends else []
        return _Computed(chunks, dict(zip(ends, sampled, strict=True)), scores)

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
            self._fail(sequence, _UNSOUND)
            return
        self._scheduler.gained(sequence)
        if not sequence.limit:
            self._finish(sequence, TokenEvent(finish_reason=FinishReason.LENGTH))
            return
        sequence.tokens.append(sampled.token_id)
        sequence.generated += 1
        self._count(generated_tokens=1)
        constraint = sequence.sampling.constraint
        if constraint and not constraint.take(sampled.token_id):
            self._fail(sequence, f"the answer cannot keep its form: {constraint.fault}")
            return
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
            if sequence.digests:
                self.on_idle()
        finally:
            sequence.generation.deliver(event)

    def _load(self, prepared: PreparedModule) -> None:
        if prepared.digest not in self._stack:
            before = self._stack.layout
            self._stack.add(prepared)
            if self._stack.layout != before:
                for sequence in self._scheduler.running:
                    sequence.gates = None
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
        self._soon(task).result()

    def _soon(self, task: Callable[[], None]) -> Future[None]:
        """Run a task on the engine's thread before the next step, in the order of the calls."""
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
        return done

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
    """What to tell of a token that was appended; an end token shows no text."""
    token, text = sampled.token_id, sequence.text
    if token in sequence.end_tokens:
        shown = text.flush() if text else ""
        told = sampled.logprob, sampled.top_logprobs
        return TokenEvent(token, shown, *told, finish_reason=FinishReason.STOP, is_end=True)
    shown = text.push(token) if text else ""
    reason = None
    if text and text.is_stopped:
        reason = FinishReason.STOP
    elif sequence.sampling.constraint and sequence.sampling.constraint.is_over:
        shown += text.flush() if text else ""
        reason = FinishReason.STOP
    elif sequence.generated >= sequence.limit:
        shown += text.flush() if text else ""
        reason = FinishReason.LENGTH
    return TokenEvent(token, shown, sampled.logprob, sampled.top_logprobs, reason)
