"""VllmEngine: the Engine whose tokens come from vLLM servers, ours or others'."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers
from torch import Tensor

from ...adapters.errors import EngineError, QueueFullError, RequestError
from ...adapters.lora import Module
from ...adapters.shapes import Shapes
from ...adapters.smoe.stored import check_plain
from ..admission import Admission
from ..engine import EngineStats, Generation
from ..first_layers import FirstLayers
from ..loading import choose_device, choose_dtype, context_length, load_tokenizer
from ..options import DEFAULT_OPTIONS, EngineOptions
from ..types import GenerationRequest, Grammar, TokenGate
from .calls import Call, Patience, Reply, send
from .generations import Generations
from .modules import VllmModules
from .options import VllmOptions
from .replicas import Replicas, ReplicaState
from .servers import dtype_flags, find_program, make_replicas, plugin_options, targets_of
from .watch import Watch

logger = logging.getLogger(__name__)

Report = Callable[[str], None]
_REPORT_EVERY_S = 5.0


class VllmEngine:
    """One backbone on any number of vLLM servers, which `start` starts or looks for.

    Bodies are passed to them as they are, by `forward`; `submit` is for those who have a prompt's
    tokens. Hidden states are those of the backbone's first layers, which are kept here. Where a
    device is not named, that is the CPU: the GPU is the servers'.

    shapes: of the backbone. modules: how many there will be at the start, and the largest rank.

    Raises:
        EngineError: the servers cannot be started as the options say.
        UnsupportedModelError: the backbone has no tokenizer, states no context length, or has
            merged experts that vLLM does not read.
    """

    def __init__(
        self,
        path: Path,
        shapes: Shapes,
        servers: VllmOptions,
        *,
        modules: tuple[int, int] = (0, 0),
        device: str = "auto",
        dtype: str = "auto",
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.options = options
        self.path = path
        check_plain(path)
        self.tokenizer = load_tokenizer(path)
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        self.width: int = config.get_text_config().hidden_size
        self.vocabulary: int = config.get_text_config().vocab_size
        self._context = context_length(config, options.max_length)
        place = choose_device("cpu" if device == "auto" else device)
        precision = choose_dtype(dtype, place)
        self._layers = FirstLayers(path, config, device=place, dtype=precision)
        self._servers = servers
        if not servers.urls:
            find_program(servers)
        self._folder = tempfile.TemporaryDirectory(
            prefix="mergeroute-vllm-", ignore_cleanup_errors=True
        )
        self._finalizer = weakref.finalize(self, self._folder.cleanup)
        folder = Path(self._folder.name)
        plugin = plugin_options(servers, folder, modules)
        flags = [*("--max-model-len", str(self._context)), *dtype_flags(dtype)]
        flags += plugin.arguments(options.max_concurrency, targets=targets_of(shapes))
        self.replicas = Replicas(make_replicas(servers, folder, path, plugin, flags))
        self._store = plugin.store
        self.modules = VllmModules(self._store, shapes, self.replicas, itemsize=precision.itemsize)
        self._watches = [
            Watch(replica, self.replicas, servers, lambda: self.modules.wanted)
            for replica in self.replicas
        ]
        self._patience = Patience(servers.first_s, servers.next_s, servers.whole_s)
        self._generations = Generations(self)
        self._counting = threading.Lock()
        self._stats = EngineStats()
        self._is_stopped = False

    # Servers.

    def start(self, report: Report = lambda _: None) -> None:
        """Start the servers, or look for them, and wait until all of ours, or one of others', are
        ready.

        Raises:
            EngineError: none is in time, or one of ours ended; then all are stopped.
        """
        for watch in self._watches:
            watch.start()
        try:
            self._wait(report)
        except BaseException:
            self.stop()
            raise

    def _wait(self, report: Report) -> None:
        began = time.monotonic()
        told_at = 0.0
        while not self._is_up:
            now = time.monotonic()
            self._forgive(report)
            failures = [watch.failure for watch in self._watches if watch.failure]
            if failures and not self._servers.urls:
                raise EngineError(failures[0])
            if now - began > self._servers.start_s:
                raise EngineError(
                    f"no vLLM server was ready after {self._servers.start_s:g} s "
                    f"(engine.start_seconds){''.join(f': {one}' for one in failures[:1])}"
                )
            if now - told_at >= _REPORT_EVERY_S:
                told_at = now
                report(self._progress(now - began))
            time.sleep(min(0.1, self._servers.probe_s))
        for state in self.replicas.snapshot():
            report(f"vLLM server {state.name}: {state.state}, {state.modules} modules")

    def _forgive(self, report: Report) -> None:
        """Under `auto` a server whose blends came out wrong ends and leaves word of it: the watch
        starts it again, and then it materialises them.
        """
        why = self._store.mismatch() if self._servers.mode == "auto" else None
        for watch in self._watches:
            if why and watch.failure and watch.replica.restarts < 2:
                watch.failure = None
                report(
                    f"vLLM server {watch.replica.name}: {why}; it is started again, to materialise"
                )

    @property
    def _is_up(self) -> bool:
        settled = [watch.has_settled.is_set() for watch in self._watches]
        return any(settled) if self._servers.urls else all(settled)

    def _progress(self, seconds: float) -> str:
        ready = sum(watch.has_settled.is_set() for watch in self._watches)
        process = self._watches[0].replica.process
        last = process.tail(1)[-100:] if process else ""
        return f"vLLM: {ready} of {len(self.replicas)} servers ready after {seconds:.0f} s {last}"

    def states(self) -> list[ReplicaState]:
        """What is known of each server."""
        return self.replicas.snapshot()

    def ailment(self, watchdog_s: float) -> str | None:
        """Why requests cannot be answered now; None: they can."""
        if self._is_stopped:
            return "the engine has stopped: restart the server"
        if not self.replicas.ready:
            states = ", ".join(f"{one.name} is {one.state}" for one in self.states())
            return f"no vLLM server is ready ({states}): wait, or look at its log"
        return None

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return not self._is_stopped

    def stop(self) -> None:
        """End the servers that are ours, and what runs on them."""
        self._is_stopped = True
        for watch in self._watches:
            watch.leave()
            if watch.replica.process:
                watch.replica.process.ask_to_end()
        for watch in self._watches:
            watch.stop()
        self._generations.stop()
        for replica in self.replicas:
            replica.clients.close()
        self._finalizer()

    # Requests.

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and completion together, on every server that is ready."""
        told = [r.served.max_length for r in self.replicas.ready if r.served]
        return min((self._context, *told)) if self._servers.urls else self._context

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot run; errors as in `Engine.check`."""
        Admission(self.max_length, self.vocabulary, has_tokenizer=True).check(request)

    async def forward(self, call: Call) -> Reply:
        """Pass a body to a server; returns once its answer has begun. Close the reply.

        Raises:
            MergerouteError: as `calls.send`; QueueFullError: too many requests run.
        """
        self._check_load()
        return await send(call, self.replicas, self._patience)

    def fields(self, path: str) -> frozenset[str] | None:
        """What bodies for a route may hold, as the servers tell; None: they do not."""
        told = [r.served.fields.get(path) for r in self.replicas.ready if r.served]
        known = [fields for fields in told if fields]
        return frozenset.intersection(*known) if known else None

    def submit(self, request: GenerationRequest) -> Generation:
        """Have a prompt's tokens continued; errors as in `Engine.submit`, and what happens on the
        way ends the generation.
        """
        self.check(request)
        self._check_load()
        if request.gate:
            self.prepare_gate(request.gate)
        if request.grammar:
            self.prepare_grammar(request.grammar)
        return self._generations.start(request)

    def prepare_gate(self, gate: TokenGate) -> None:
        """Refuse it: inside vLLM blends are fixed for a request.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            f"routing by token ({gate.routing.method}) needs the torch engine, and this server "
            "runs vLLM: route by request, or start with --engine torch",
            parameter="routing",
        )

    def prepare_grammar(self, grammar: Grammar) -> None:
        """Refuse it: bodies with grammars are passed on.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            f"{grammar.parameter} is for vLLM itself to keep to: pass the body on",
            parameter=grammar.parameter,
        )

    def load_module(self, module: Module) -> str:
        """Make a module known to all servers; returns its digest."""
        read = self.modules.prepare(module)
        self.modules.put(read)
        return read.digest

    def unload_module(self, digest: str) -> None:
        """Undo it."""
        self.modules.drop(digest).result()

    def encode(self, prompts: Sequence[tuple[int, ...]], layers: Sequence[int]) -> list[Tensor]:
        """Hidden states after the backbone's first layers; see `Engine.encode`."""
        return self._layers.encode(prompts, layers)

    def embed(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Refuse it: the backbone's last layers are in the servers.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "embeddings need the torch engine, and this server runs vLLM: ask a server that was "
            "started with --engine torch",
            parameter="model",
        )

    # Counts.

    def count(self, *, prompt: int, cached: int, generated: int) -> None:
        """An answer has ended; tokens of it."""
        with self._counting:
            was = self._stats
            self._stats = EngineStats(
                prompt_tokens=was.prompt_tokens + prompt,
                reused_tokens=was.reused_tokens + cached,
                generated_tokens=was.generated_tokens + generated,
                admitted=was.admitted + 1,
                reused=was.reused + (cached > 0),
            )

    def stats(self) -> EngineStats:
        """Counts of answers that have ended, and the load. Steps are the servers' own affair."""
        slots = self.options.max_concurrency * max(1, len(self.replicas.ready))
        running = self.replicas.in_flight
        return EngineStats(
            prompt_tokens=self._stats.prompt_tokens,
            reused_tokens=self._stats.reused_tokens,
            generated_tokens=self._stats.generated_tokens,
            admitted=self._stats.admitted,
            reused=self._stats.reused,
            running=min(running, slots),
            waiting=max(0, running - slots),
            modules=len(self.modules.wanted),
            slots=slots,
        )

    def modules_asked(self) -> tuple[frozenset[str], frozenset[str]]:
        """Digests of the modules of requests that run; which of them wait only a server knows."""
        return self.replicas.in_use, frozenset()

    def _check_load(self) -> None:
        stats = self.stats()
        if stats.waiting >= self.options.max_waiting:
            raise QueueFullError(
                f"{stats.waiting} requests wait for vLLM, the limit is {self.options.max_waiting} "
                "(max_waiting): try again later"
            )
