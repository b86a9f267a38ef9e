"""The engine under stress: limits, ends, cancellation, failures, and modules that come and go."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    ModuleError,
    QueueFullError,
    RequestError,
    RouterError,
    UnknownModuleError,
    UnsupportedModelError,
)
from mergeroute.adapters.lora import Module
from mergeroute.runtime.engine import Generation
from mergeroute.runtime.merging import merge_into
from mergeroute.runtime.module_stack import ModuleStack
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent

from ..tiny import (
    VOCABULARY,
    make_model,
    make_module,
    make_modules,
    make_prompt,
    make_tokenizer,
    reference_tokens,
)

PROMPT = make_prompt(12, seed=1)
TOKENS = 10
PLAIN = make_model()
MODULES = make_modules(PLAIN, 3)
LAYER = "model.layers.1.mlp.up_proj"


def make_engine(model: Any = None, *, tokenizer: Any = None, **options: Any) -> TorchEngine:
    limits = EngineOptions(**{"max_concurrency": 4, **options})
    return TorchEngine(copy.deepcopy(model or PLAIN), tokenizer=tokenizer, options=limits)


@pytest.fixture
def engine() -> Iterator[TorchEngine]:
    with make_engine() as made:
        yield made


def request(
    prompt: tuple[int, ...] = PROMPT, blend: Blend | None = None, **sampling: Any
) -> GenerationRequest:
    params = {"max_tokens": TOKENS, "temperature": 0.0, **sampling}
    return GenerationRequest(prompt, blend or Blend(), SamplingParams(**params))


def tokens_in(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def run(engine: TorchEngine, *arguments: Any, **sampling: Any) -> list[TokenEvent]:
    return list(engine.submit(request(*arguments, **sampling)))


def expected(
    blend: Blend | None = None, *, prompt: tuple[int, ...] = PROMPT, count: int = TOKENS
) -> list[int]:
    return reference_tokens(PLAIN, MODULES, blend or Blend(), prompt, count)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for ten seconds"
        time.sleep(0.005)


def is_idle(engine: TorchEngine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == 0


# Limits.


def test_faulty_requests_are_refused_by_name(engine: TorchEngine) -> None:
    faulty = [
        (request(()), RequestError, "empty", "prompt"),
        (request((1, VOCABULARY)), RequestError, "300", "prompt"),
        (request((1, -1)), RequestError, "-1", "prompt"),
        (request(logit_bias={VOCABULARY: 1.0}), RequestError, "300", "logit_bias"),
        (request(stop=("x",)), RequestError, "tokenizer", "stop"),
        (request((1,) * 256), ContextLengthError, "256 tokens", "prompt"),
        (request((1,) * 1000, max_tokens=None), ContextLengthError, "1,000", "prompt"),
        (request((1,) * 250, max_tokens=7), ContextLengthError, "250", "max_tokens"),
        (request(max_tokens=10**9), ContextLengthError, "1,000,000,000", "max_tokens"),
    ]
    for asked, kind, text, parameter in faulty:
        with pytest.raises(kind, match=text) as caught:
            engine.submit(asked)
        assert isinstance(caught.value, RequestError)
        assert caught.value.parameter == parameter
    with pytest.raises(UnknownModuleError, match="sha256:0"):
        engine.submit(request(PROMPT, Blend({"sha256:0": 1.0})))
    assert is_idle(engine)
    assert tokens_in(run(engine)) == expected()


def test_the_whole_context_can_be_used() -> None:
    with make_engine(max_length=20) as engine:
        assert engine.max_length == 20
        for sampling in ({"max_tokens": 8}, {"max_tokens": None}):
            events = run(engine, **sampling)
            assert events[-1].finish_reason is FinishReason.LENGTH
            assert tokens_in(events) == expected(count=8)
        [only] = run(engine, (1,) * 19, max_tokens=None)
        assert only.finish_reason is FinishReason.LENGTH
        with pytest.raises(ContextLengthError, match="the limit is 19"):
            engine.submit(request((1,) * 20, max_tokens=None))


@pytest.mark.parametrize("wanted", [0, 1, -5, 257, 10**6])
def test_a_context_that_the_model_cannot_take_is_refused(wanted: int) -> None:
    with pytest.raises(EngineError, match="allows 2 to 256"):
        make_engine(max_length=wanted)


@pytest.mark.parametrize("name", ["max_concurrency", "token_budget", "max_waiting"])
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(EngineError, match=f"{name} is 0"):
        EngineOptions(**{name: 0})
    with pytest.raises(EngineError, match="token_budget 3 is below max_concurrency 4"):
        EngineOptions(token_budget=3, max_concurrency=4)


def test_a_full_queue_refuses_and_recovers() -> None:
    with make_engine(max_concurrency=1, max_waiting=2) as engine:
        long_run = engine.submit(request(max_tokens=240))
        next(iter(long_run))
        waiting = [engine.submit(request()) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            engine.submit(request())
        assert engine.stats().waiting == 2
        long_run.cancel()
        assert [tokens_in(list(one)) for one in waiting] == [expected()] * 2
        assert tokens_in(run(engine)) == expected()


def test_a_refused_request_does_not_hold_its_module() -> None:
    with make_engine(max_concurrency=1, max_waiting=1) as engine:
        digest = engine.load_module(MODULES["m0"])
        long_run = engine.submit(request(max_tokens=240))
        next(iter(long_run))
        engine.submit(request())
        with pytest.raises(QueueFullError):
            engine.submit(request(PROMPT, Blend({digest: 1.0})))
        engine.unload_module(digest)
        assert engine.stats().modules == 0


# Ends.


def test_max_tokens_is_exact_and_says_length(engine: TorchEngine) -> None:
    for count in (1, 2, 7):
        events = run(engine, max_tokens=count)
        assert tokens_in(events) == expected(count=count)
        assert [e.finish_reason for e in events] == [None] * (count - 1) + [FinishReason.LENGTH]


def test_end_tokens_end_unless_ignored() -> None:
    tokens = expected()
    end = tokens[4]
    at = tokens.index(end)
    for stated in (end, [299, end]):
        model = copy.deepcopy(PLAIN)
        model.generation_config.eos_token_id = stated
        with make_engine(model) as engine:
            events = run(engine, top_logprobs=1)
            assert tokens_in(events) == tokens[: at + 1]
            assert events[-1].finish_reason is FinishReason.STOP
            assert events[-1].logprob is not None
            assert (events[-1].is_end, events[-1].text) == (True, "")
            assert all(event.logprob for event in events[:-1])
            events = run(engine, ignore_eos=True)
            assert tokens_in(events) == tokens
            assert events[-1].finish_reason is FinishReason.LENGTH


def test_stop_token_ids_end_even_when_end_tokens_are_ignored(engine: TorchEngine) -> None:
    tokens = expected()
    for ignore_eos in (False, True):
        events = run(engine, stop_token_ids=(tokens[3], 298), ignore_eos=ignore_eos)
        assert tokens_in(events) == tokens[: tokens.index(tokens[3]) + 1]
        assert events[-1].finish_reason is FinishReason.STOP


def test_a_stop_beats_the_limit_on_the_same_token(engine: TorchEngine) -> None:
    first = expected()[0]
    [only] = run(engine, max_tokens=1, stop_token_ids=(first,))
    assert only.finish_reason is FinishReason.STOP


def make_speaker(text: str) -> TorchEngine:
    """An engine that says `text` after any prompt of one token, one token a byte."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text)
    engine = make_engine(tokenizer=tokenizer)

    def say(_module: Any, _inputs: Any, keywords: Any, output: Any) -> Any:
        positions = keywords["position_ids"][0, keywords["logits_to_keep"]]
        output.logits[:] = -100.0
        for row, at in enumerate(positions.tolist()):
            output.logits[0, row, ids[at] if at < len(ids) else VOCABULARY - 1] = 100.0
        return output

    engine.model.register_forward_hook(say, with_kwargs=True)
    return engine


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.parametrize(
    ("stop", "shown", "reason"),
    [
        ((), "grün 🐍 STO", FinishReason.LENGTH),
        (("never",), "grün 🐍 STO", FinishReason.LENGTH),
        (("STOP",), "grün 🐍 STO", FinishReason.LENGTH),
        (("STO",), "grün 🐍 ", FinishReason.STOP),
        (("x", "🐍 S"), "grün ", FinishReason.STOP),
        (("ün",), "gr", FinishReason.STOP),
        (("g",), "", FinishReason.STOP),
    ],
)
def test_stop_texts_end_and_are_not_shown(
    stop: tuple[str, ...], shown: str, reason: FinishReason
) -> None:
    text = "grün 🐍 STO"
    with make_speaker(text) as engine:
        events = run(engine, (1,), stop=stop, max_tokens=len(text.encode()))
    assert text_of(events) == shown
    assert events[-1].finish_reason is reason
    assert all("\ufffd" not in event.text for event in events)
    ids = make_tokenizer().encode(text)
    assert tokens_in(events) == ids[: len(tokens_in(events))]
    if reason is FinishReason.LENGTH:
        assert len(tokens_in(events)) == len(ids)


def test_what_was_held_back_is_shown_at_an_end_token() -> None:
    with make_speaker("grün STO") as engine:
        sampling = {"max_tokens": 20, "stop_token_ids": (VOCABULARY - 1,)}
        events = run(engine, (1,), stop=("STOP",), **sampling)
    assert text_of(events) == "grün STO"
    assert events[-1].text == "STO"
    assert (events[-1].token_id, events[-1].finish_reason) == (VOCABULARY - 1, FinishReason.STOP)


def test_an_unfinished_character_is_not_lost_at_the_limit() -> None:
    with make_speaker("a🐍") as engine:
        assert text_of(run(engine, (1,), max_tokens=3)) == "a\ufffd"
        assert text_of(run(engine, (1,), max_tokens=5)) == "a🐍"


def test_without_tokenizer_events_carry_no_text(engine: TorchEngine) -> None:
    assert text_of(run(engine)) == ""


# Cancellation and stopping.


def test_cancelling_delivers_an_end_and_frees_the_slot() -> None:
    with make_engine(max_concurrency=1) as engine:
        digest = engine.load_module(MODULES["m0"])
        long_run = engine.submit(request(PROMPT, Blend({digest: 1.0}), max_tokens=240))
        events = iter(long_run)
        next(events)
        engine.unload_module(digest)
        assert engine.stats().modules == 1
        long_run.cancel()
        rest = list(events)
        assert rest[-1].finish_reason is FinishReason.CANCELLED
        assert rest[-1].token_id is None
        assert len(rest) < 239
        assert is_idle(engine)
        wait_until(lambda: engine.stats().modules == 0)
        assert tokens_in(run(engine)) == expected()


def test_a_waiting_request_can_be_cancelled() -> None:
    with make_engine(max_concurrency=1) as engine:
        long_run = engine.submit(request(max_tokens=240))
        stream = iter(long_run)
        next(stream)
        waiting = engine.submit(request())
        waiting.cancel()
        waiting.cancel()
        [only] = list(waiting)
        assert (only.token_id, only.finish_reason) == (None, FinishReason.CANCELLED)
        assert waiting.is_cancelled
        assert len(list(stream)) == 239


def test_cancelling_what_has_ended_does_nothing(engine: TorchEngine) -> None:
    done = engine.submit(request())
    assert tokens_in(list(done)) == expected()
    done.cancel()
    assert tokens_in(run(engine)) == expected()


def test_stopping_ends_everything_with_an_event() -> None:
    engine = make_engine(max_concurrency=2)
    digest = engine.load_module(MODULES["m0"])
    blend = Blend({digest: 1.0})
    running = [engine.submit(request(PROMPT, blend, max_tokens=240)) for _ in range(5)]
    engine.stop()
    for generation in running:
        events = list(generation)
        assert events[-1].finish_reason is FinishReason.CANCELLED
        assert len(events) < 240
    assert is_idle(engine)
    engine.stop()
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.submit(request())
    with pytest.raises(EngineStoppedError):
        engine.load_module(MODULES["m1"])
    with pytest.raises(EngineStoppedError):
        engine.unload_module(digest)


# Consumers.


async def collect(generation: Generation) -> list[int]:
    return tokens_in([event async for event in generation])


def test_many_asynchronous_consumers_each_get_their_own() -> None:
    prompts = [make_prompt(4 + k, seed=k) for k in range(12)]

    async def main(engine: TorchEngine) -> list[list[int]]:
        running = [engine.submit(request(prompt)) for prompt in prompts]
        return await asyncio.gather(*map(collect, running))

    with make_engine() as engine:
        results = asyncio.run(main(engine))
    assert results == [expected(prompt=prompt) for prompt in prompts]


def test_the_event_loop_is_free_while_a_consumer_waits() -> None:
    async def main(engine: TorchEngine) -> int:
        ticks = 0
        task = asyncio.create_task(collect(engine.submit(request(max_tokens=200))))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        assert len(task.result()) == 200
        return ticks

    with make_engine() as engine:
        assert asyncio.run(main(engine)) > 50


def test_events_that_arrived_before_anybody_looked_are_kept(engine: TorchEngine) -> None:
    generation = engine.submit(request())
    wait_until(lambda: is_idle(engine))
    assert asyncio.run(collect(generation)) == expected()


def test_consumers_that_walk_away_do_not_hurt_the_engine(engine: TorchEngine) -> None:
    async def first(generation: Generation) -> int | None:
        async for event in generation:
            return event.token_id
        return None

    for _ in range(5):
        assert asyncio.run(first(engine.submit(request(max_tokens=60)))) == expected()[0]
    assert tokens_in(run(engine)) == expected()
    wait_until(lambda: is_idle(engine))


def test_threads_submit_at_once() -> None:
    results: dict[int, list[int]] = {}
    with make_engine(max_concurrency=3) as made:

        def work(k: int) -> None:
            results[k] = tokens_in(run(made, make_prompt(5 + k, seed=k)))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {k: expected(prompt=make_prompt(5 + k, seed=k)) for k in range(8)}


# Failures.


def huge(right: float, left: float) -> Module:
    """Finite factors whose product is far beyond float32."""
    return Module("huge", {LAYER: LowRank(torch.full((48, 2), left), torch.full((2, 32), right))})


@pytest.mark.parametrize(("right", "left"), [(1e25, 1e25), (3e38, 1.0), (1.0, 3e38)])
def test_a_module_whose_products_overflow_is_refused(
    right: float, left: float, engine: TorchEngine
) -> None:
    """Gates of zero times what overflows would be NaN in its neighbours."""
    with pytest.raises(ModuleError, match=rf"'{LAYER}' is too large for torch.float32"):
        engine.load_module(huge(right, left))
    assert engine.stats().modules == 0


@pytest.mark.parametrize(("right", "left"), [(0.4, 3e38), (3e37, 1.0)])
def test_a_module_that_overflows_in_use_fails_alone(right: float, left: float) -> None:
    """Its neighbours blend other modules. One token is decoded in their midst: one product over
    the ranks of all of them.
    """
    blends = [Blend({"m0": 1.0}), Blend({"m1": -0.5}), Blend()]
    with make_engine() as engine:
        digests = {name: engine.load_module(module) for name, module in MODULES.items()}
        bad = engine.load_module(huge(right, left))
        running = [
            engine.submit(request(PROMPT, blend.renamed(digests), max_tokens=60))
            for blend in blends
        ]
        for generation in running:
            next(iter(generation))
        failing = engine.submit(request(PROMPT[:1], Blend({bad: 8.0}), max_tokens=50))
        results = [tokens_in(list(generation)) for generation in running]
        events = list(failing)
        assert results == [expected(blend, count=60)[1:] for blend in blends]
        assert events[-1].finish_reason is FinishReason.ERROR
        assert "NaN or inf" in str(events[-1].error)
        assert tokens_in(run(engine)) == expected()
        assert is_idle(engine)


def test_a_module_too_large_for_the_dtype_is_refused() -> None:
    with make_engine(make_model().half()) as engine:
        with pytest.raises(ModuleError, match="too large"):
            engine.load_module(huge(1.0, 1e6))
        with pytest.raises(ModuleError, match="too large"):
            engine.load_module(huge(1e6, 1.0))
        assert engine.stats().modules == 0
        engine.load_module(huge(1e-3, 1.0))


def _trap(model: Any, token: int) -> None:
    """Make the model raise whenever a token is in the batch."""

    def check(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == token).any():
            raise RuntimeError(f"token {token} is cursed")

    model.get_input_embeddings().register_forward_pre_hook(check)


@pytest.mark.parametrize("token_budget", [8, 512])
def test_a_request_that_breaks_the_forward_fails_alone(token_budget: int) -> None:
    cursed = 299
    prompts = [tuple(t % 299 for t in make_prompt(n, seed=n)) for n in (5, 9, 20)]
    wanted = [expected(prompt=prompt, count=20) for prompt in prompts]
    assert cursed not in {token for tokens in wanted for token in tokens}
    with make_engine(token_budget=token_budget) as engine:
        _trap(engine.model, cursed)
        running = [engine.submit(request(prompt, max_tokens=20)) for prompt in prompts]
        failing = engine.submit(request((*PROMPT[:4], cursed)))
        assert [tokens_in(list(generation)) for generation in running] == wanted
        [only] = list(failing)
        assert (only.token_id, only.finish_reason) == (None, FinishReason.ERROR)
        assert "the engine failed on this request" in str(only.error)
        [only] = run(engine, (cursed,) * 20)
        assert only.finish_reason is FinishReason.ERROR
        assert tokens_in(run(engine, prompts[0], max_tokens=20)) == wanted[0]
        assert is_idle(engine)


def test_a_request_that_breaks_in_mid_generation_fails_alone() -> None:
    tokens = expected(count=20)
    at = 6
    cursed = tokens[at]
    others = [p for k in range(40) if cursed not in (p := make_prompt(8, seed=k))]
    calm = next(p for p in others if cursed not in expected(prompt=p, count=20))
    with make_engine() as engine:
        _trap(engine.model, cursed)
        failing = engine.submit(request(max_tokens=20))
        neighbour = engine.submit(request(calm, max_tokens=20))
        events = list(failing)
        assert tokens_in(events) == tokens[: tokens.index(cursed) + 1]
        assert events[-1].finish_reason is FinishReason.ERROR
        assert tokens_in(list(neighbour)) == expected(prompt=calm, count=20)


class _Lazy(dict[str, LowRank]):
    """Deltas whose file is gone by the time they are read."""

    def items(self) -> Any:
        raise OSError("the disk is gone")


def test_a_module_that_fails_while_loading_leaves_everything_as_it_was() -> None:
    blend = Blend({"m0": 1.0})
    with make_engine() as engine:
        digest = engine.load_module(MODULES["m0"])
        digests = {"m0": digest}
        long_run = engine.submit(request(PROMPT, blend.renamed(digests), max_tokens=100))
        wrong_shape = {LAYER: LowRank(torch.ones(3, 1), torch.ones(1, 32))}
        unknown = {"model.layers.9.mlp.up_proj": LowRank(torch.ones(48, 1), torch.ones(1, 32))}
        zero = {LAYER: LowRank(torch.zeros(48, 1), torch.ones(1, 32))}
        nan = {LAYER: LowRank(torch.full((48, 1), torch.nan), torch.ones(1, 32))}
        for deltas in (wrong_shape, unknown, zero, nan, {}):
            with pytest.raises(ModuleError):
                engine.load_module(Module("bad", deltas))
        lazy = Module("lazy", _Lazy(MODULES["m1"].deltas))
        with pytest.raises(OSError, match="the disk is gone"):
            engine.load_module(lazy)
        assert engine.stats().modules == 1
        with pytest.raises(UnknownModuleError):
            engine.submit(request(PROMPT, Blend({lazy.digest: 1.0})))
        assert tokens_in(list(long_run)) == expected(blend, count=100)
        other = {"m1": engine.load_module(MODULES["m1"])}
        blend = Blend({"m1": 1.0})
        assert tokens_in(run(engine, PROMPT, blend.renamed(other))) == expected(blend)


# Modules.


def test_loads_are_counted(engine: TorchEngine) -> None:
    blend = Blend({"m0": 1.0})
    digest = engine.load_module(MODULES["m0"])
    again = Module("another name", MODULES["m0"].deltas)
    assert engine.load_module(again) == digest == MODULES["m0"].digest
    assert engine.stats().modules == 1
    engine.unload_module(digest)
    assert tokens_in(run(engine, PROMPT, blend.renamed({"m0": digest}))) == expected(blend)
    engine.unload_module(digest)
    assert engine.stats().modules == 0
    with pytest.raises(UnknownModuleError, match=digest):
        engine.submit(request(PROMPT, Blend({digest: 1.0})))
    for unknown in (digest, "sha256:0"):
        with pytest.raises(UnknownModuleError, match="is not loaded"):
            engine.unload_module(unknown)
    assert engine.load_module(MODULES["m0"]) == digest
    assert tokens_in(run(engine, PROMPT, blend.renamed({"m0": digest}))) == expected(blend)


def test_a_module_is_not_offered_once_unloaded_though_a_request_still_uses_it() -> None:
    with make_engine() as engine:
        digest = engine.load_module(MODULES["m0"])
        blend = Blend({digest: 1.0})
        long_run = engine.submit(request(PROMPT, blend, max_tokens=200))
        next(iter(long_run))
        engine.unload_module(digest)
        with pytest.raises(UnknownModuleError):
            engine.submit(request(PROMPT, blend))
        assert engine.load_module(MODULES["m0"]) == digest
        assert tokens_in(list(long_run)) == expected(Blend({"m0": 1.0}), count=200)[1:]
        assert engine.stats().modules == 1
        assert tokens_in(run(engine, PROMPT, blend)) == expected(Blend({"m0": 1.0}))


def test_ranks_are_used_again() -> None:
    stack = ModuleStack(copy.deepcopy(PLAIN))
    four, five, six = (make_module(PLAIN, "m", rank=r, seed=r) for r in (4, 5, 6))
    for module in (five, six, four):
        stack.add(stack.prepare(module))
    assert (stack.ranks, len(stack)) == (15, 3)
    stack.remove(six.digest)
    assert (stack.ranks, len(stack)) == (15, 2)
    small = make_module(PLAIN, "m", rank=3, seed=9)
    stack.add(stack.prepare(small))
    stack.add(stack.prepare(make_module(PLAIN, "m", rank=3, seed=10)))
    assert stack.ranks == 15
    stack.remove(four.digest)
    assert stack.ranks == 11
    for digest in (five.digest, small.digest):
        stack.remove(digest)
    assert len(stack) == 1


def test_memory_stays_flat_over_many_loads() -> None:
    def held(engine: TorchEngine) -> int:
        return sum(buffer.nbytes for buffer in engine.model.buffers())

    with make_engine() as engine:
        bare = held(engine)
        kept = engine.load_module(MODULES["m0"])
        sizes = []
        for seed in range(6):
            digest = engine.load_module(make_module(PLAIN, "m", rank=4, seed=100 + seed))
            sizes.append(held(engine))
            engine.unload_module(digest)
        assert len(set(sizes)) == 1
        engine.unload_module(kept)
        assert held(engine) == bare


# Hidden states.


@torch.no_grad()
def hidden_states(model: Any, prompt: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([prompt])
    out = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return tuple(states[0] for states in out.hidden_states)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3"])
def test_encode_gives_transformers_hidden_states(architecture: str) -> None:
    model = make_model(architecture)
    prompts = [make_prompt(length, seed=length) for length in (40, 1, 17)]
    wanted = [hidden_states(model, prompt) for prompt in prompts]
    with make_engine(model) as engine:
        for layers in ((1,), (2, 1), (1,)):
            found = engine.encode(prompts, layers)
            for states, expected in zip(found, wanted, strict=True):
                assert states.dtype == torch.float32
                stacked = torch.stack([expected[layer] for layer in layers])
                torch.testing.assert_close(states, stacked, atol=1e-4, rtol=1e-4)
        assert engine.encode(prompts[:1], (3,))[0].shape == (1, *wanted[0][3].shape)


def test_many_prompts_are_encoded_as_each_alone() -> None:
    prompts = [make_prompt(100, seed=k) for k in range(50)]
    with make_engine() as engine:
        together = engine.encode(prompts, (2,))
        for states, prompt in zip(together, prompts, strict=True):
            alone = engine.encode([prompt], (2,))[0]
            torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)
        assert engine.encode([], (2,)) == []


def test_encoding_the_last_layer_is_before_the_final_norm() -> None:
    with make_engine() as engine:
        states = engine.encode([PROMPT], (3,))[0][0]
        normed = engine.model.model.norm(states)
    torch.testing.assert_close(normed, hidden_states(PLAIN, PROMPT)[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1, 4, 100])
def test_layers_that_do_not_exist_are_refused(layer: int, engine: TorchEngine) -> None:
    with pytest.raises(RouterError, match="1 to 3"):
        engine.encode([PROMPT], (layer,))


def test_encode_is_untouched_by_modules_and_running_requests() -> None:
    blend = Blend({"m0": 1.0, "m1": -0.5})
    with make_engine() as engine:
        before = engine.encode([PROMPT], (2,))[0]
        digests = {name: engine.load_module(MODULES[name]) for name in ("m0", "m1")}
        asked = request(PROMPT, blend.renamed(digests), max_tokens=150)
        running = [engine.submit(asked) for _ in range(3)]
        found: list[torch.Tensor] = []

        def encode() -> None:
            found.extend(engine.encode([PROMPT], (2,))[0] for _ in range(10))

        threads = [threading.Thread(target=encode) for _ in range(3)]
        for thread in threads:
            thread.start()
        results = [tokens_in(list(generation)) for generation in running]
        for thread in threads:
            thread.join()
    assert len(found) == 30
    assert all(torch.equal(states, before) for states in found)
    assert results == [expected(blend, count=150)] * 3


# Models.


def make_unsupported(name: str) -> Any:
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    configs: dict[str, Any] = {
        "mamba": lambda: transformers.MambaConfig(**small, state_size=4),
        "bloom": lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4
        ),
        "mpt": lambda: transformers.MptConfig(
            vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **small,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()


@pytest.mark.parametrize("name", ["mamba", "bloom", "mpt", "gpt_oss"])
def test_models_that_cannot_be_served_exactly_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"[a-z]{4}"):
        TorchEngine(make_unsupported(name))


def test_a_huge_factor_beside_a_tiny_one_is_exact() -> None:
    """Only the product counts: its factors may lie anywhere."""
    deltas = {n: LowRank(d.left * 1e-30, d.right * 1e30) for n, d in MODULES["m0"].deltas.items()}
    skewed = Module("skewed", deltas)
    with make_engine() as engine:
        digest = engine.load_module(skewed)
        assert tokens_in(run(engine, PROMPT, Blend({digest: 1.0}))) == expected(Blend({"m0": 1.0}))


def test_dropout_is_off() -> None:
    model = make_model().train()
    with make_engine(model) as engine:
        assert not engine.model.training


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_bfloat16_is_within_tolerance_of_the_merged_float32_model(architecture: str) -> None:
    """Log-probabilities of the best twenty tokens within 0.05, where the blend moves them by 1."""
    plain = make_model(architecture)
    modules = {name: make_module(plain, name, seed=s) for s, name in enumerate("ab")}
    blend = Blend({"a": 0.75, "b": -0.25})
    merged = copy.deepcopy(plain)
    merge_into(merged, modules, blend)
    with torch.no_grad():
        wanted = merged(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        bare = plain(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    with make_engine(plain.bfloat16()) as engine:
        digests = {name: engine.load_module(module) for name, module in modules.items()}
        asked = request(PROMPT, blend.renamed(digests), max_tokens=1, top_logprobs=20)
        [event] = list(engine.submit(asked))
    assert len(event.top_logprobs) == 20
    for top in event.top_logprobs:
        assert top.logprob == pytest.approx(float(wanted[top.token_id]), abs=0.05)
    assert (wanted - bare).abs().max() > 1
