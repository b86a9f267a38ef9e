"""Answers that keep a form, on an engine where others run beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.adapters.errors import RequestError
from mergeroute.runtime.grammar import MAX_GRAMMAR_BYTES, Grammars, allowed_tokens
from mergeroute.runtime.loading import end_tokens
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.sampling import SamplingState, sample
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.runtime.types import (
    FinishReason,
    GenerationRequest,
    Grammar,
    SamplingParams,
    TokenEvent,
)
from mergeroute.serving.cli import DEMO_BANK
from mergeroute.serving.formats.grammars import choice_grammar, json_grammar, regex_grammar

from ..tiny import VOCABULARY, make_model, make_prompt, make_tokenizer

TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id
BLANKS = {TOKENIZER(blank)["input_ids"][0]: -100.0 for blank in " \n\t"}
"""A random model likes them, and its context is short."""
PROMPT = make_prompt(12, seed=1)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -9, "maximum": 999}, "b": {"enum": ["x"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    options = EngineOptions(max_concurrency=8)
    with TorchEngine(make_model(), tokenizer=TOKENIZER, options=options) as made:
        yield made


def request(text: str | None, **sampling: Any) -> GenerationRequest:
    grammar = Grammar(text, "response_format") if text else None
    params = {"max_tokens": 60, "logit_bias": BLANKS, "seed": 1, **sampling}
    return GenerationRequest(PROMPT, sampling=SamplingParams(**params), grammar=grammar)


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def tokens_of(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


scalars = st.one_of(
    st.builds(
        lambda low: {"type": "integer", "minimum": low, "maximum": low + 40}, st.integers(-99, 99)
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.text(st.characters(codec="utf-8"), max_size=3), min_size=1, max_size=3, unique=True
        ),
    ),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(
            lambda properties, needed: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "é"]), inner, max_size=3),
            st.booleans(),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None)
@given(schemas, st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 99))
def test_a_finished_answer_follows_its_schema(
    engine: TorchEngine, schema: dict[str, Any], temperature: float, seed: int
) -> None:
    asked = request(json_grammar(schema), temperature=temperature, seed=seed, max_tokens=200)
    events = list(engine.submit(asked))
    assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH), events[-1].error
    if events[-1].finish_reason is FinishReason.STOP:
        assert jsonschema_rs.is_valid(schema, json.loads(text_of(events)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_with_and_without_a_form_change_nothing(
    engine: TorchEngine, temperature: float
) -> None:
    forms = [
        None,
        json_grammar(SCHEMA),
        regex_grammar("[a-f]{9}"),
        None,
        choice_grammar(["zz", "é"]),
    ]
    asked = [
        request(form, temperature=temperature, seed=k, max_tokens=30)
        for k, form in enumerate(forms)
    ]
    alone = [tokens_of(list(engine.submit(one))) for one in asked]
    together = [engine.submit(one) for one in asked]
    assert [tokens_of(list(generation)) for generation in together] == alone


def test_forms_are_kept_and_an_answer_ends_where_nothing_can_follow(engine: TorchEngine) -> None:
    events = list(engine.submit(request(json_grammar(SCHEMA), temperature=0.0)))
    answer = json.loads(text_of(events))
    assert jsonschema_rs.is_valid(SCHEMA, answer)
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].text == "}"
    for seed in range(5):
        events = list(engine.submit(request(choice_grammar(['"é\n', "b"]), seed=seed)))
        assert text_of(events) in ('"é\n', "b")
        assert list(map(tokens_of, [events])) == [
            tokens_of(list(engine.submit(request(choice_grammar(['"é\n', "b"]), seed=seed))))
        ]


def test_an_answer_that_could_go_on_ends_with_an_end_token_or_is_cut(engine: TorchEngine) -> None:
    ends = set()
    for seed in range(8):
        asked = request(regex_grammar("[0-9]+"), seed=seed, logit_bias={END: 5.0}, max_tokens=30)
        events = list(engine.submit(asked))
        assert text_of(events).isdecimal()
        ends.add((events[-1].finish_reason, events[-1].token_id == END))
        assert END not in tokens_of(events)[:-1]
    assert (FinishReason.STOP, True) in ends
    cut = list(
        engine.submit(request(regex_grammar("[0-9]+"), logit_bias={END: -100.0}, max_tokens=5))
    )
    assert (cut[-1].finish_reason, len(text_of(cut))) == (FinishReason.LENGTH, 5)


def test_a_stop_text_ends_an_answer_before_its_form_is_complete(engine: TorchEngine) -> None:
    events = list(engine.submit(request(regex_grammar("a{9}b{9}"), stop=("ab",))))
    assert (text_of(events), events[-1].finish_reason) == ("a" * 8, FinishReason.STOP)


def test_log_probabilities_are_of_the_unmodified_logits(engine: TorchEngine) -> None:
    free = next(iter(engine.submit(request(None, top_logprobs=3))))
    kept = next(iter(engine.submit(request(regex_grammar("z+"), top_logprobs=3))))
    assert kept.text == "z"
    for one, other in zip(kept.top_logprobs, free.top_logprobs, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert kept.logprob is not None
    assert kept.logprob.token_id == TOKENIZER("z")["input_ids"][0]
    assert kept.logprob.logprob < kept.top_logprobs[0].logprob


def test_special_tokens_and_ids_of_no_token_never_come() -> None:
    grammars = Grammars(TOKENIZER, frozenset([END]))
    constraint = grammars.constraint(Grammar(r"start: /(.|\n)*/", "regex"))
    (allowed,) = allowed_tokens([constraint], torch.zeros(1, VOCABULARY)).tolist()
    assert allowed[END]
    assert not any(allowed[END + 1 :])
    assert sum(allowed[:END]) > 150
    (cut,) = allowed_tokens([constraint], torch.zeros(1, 99)).tolist()
    assert cut == allowed[:99]
    assert constraint.take(5)
    assert not constraint.take(END + 1)
    assert constraint.fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json_grammar({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (json_grammar({"type": "frob"}), "Invalid type: frob"),
        (json_grammar({"$ref": "http://127.0.0.1/x"}), "not present"),
        (json_grammar({"enum": []}), "Unsatisfiable"),
        (json_grammar({"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented"),
        (regex_grammar("(a"), "regex parse error: unclosed group"),
        (json_grammar({"type": "string", "pattern": "a)"}), "error: unopened group"),
        (regex_grammar(r"a[^\s\S]"), "nothing can match it"),
        ("start: start", "nothing can match it"),
        ("start: nobody", "nobody"),
        (f"start: {'(' * 5000}", "nested"),
        (regex_grammar("(a{1000}){1000}"), "too many"),
        (json_grammar({"enum": ["x" * MAX_GRAMMAR_BYTES]}), "131,072"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_before_it_runs(
    engine: TorchEngine, text: str, words: str
) -> None:
    with pytest.raises(RequestError, match="response_format") as refused:
        engine.prepare_grammar(Grammar(text, "response_format"))
    assert words in str(refused.value)
    assert refused.value.parameter == "response_format"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_to_draw_fails_alone(temperature: float) -> None:
    form = Grammar(choice_grammar(["ab"]), "guided_choice")
    constraint = Grammars(TOKENIZER, frozenset([END])).constraint(form)
    logits = torch.zeros(2, VOCABULARY)
    logits[0, allowed_tokens([constraint], logits[:1])[0]] = -torch.inf
    params = SamplingParams(temperature=temperature)
    states = [SamplingState(params, [1], 1, constraint=one) for one in (constraint, None)]
    held, free = sample(logits, states)
    assert held is None
    assert free is not None


def test_a_grammar_at_fault_is_refused_at_once_the_second_time() -> None:
    grammars = Grammars(TOKENIZER, frozenset([END]))
    text = regex_grammar("(a{1000}){1000}")
    faults, seconds = [], []
    for parameter in ("guided_regex", "structured_outputs"):
        begun = time.perf_counter()
        with pytest.raises(RequestError) as refused:
            grammars.constraint(Grammar(text, parameter))
        seconds.append(time.perf_counter() - begun)
        faults.append(str(refused.value).split(" ", 1))
    assert [name for name, _ in faults] == ["guided_regex", "structured_outputs"]
    assert faults[0][1] == faults[1][1]
    assert seconds[1] < seconds[0] / 3


def test_tokenizers_that_cannot_be_constrained_are_refused() -> None:
    endless = make_tokenizer()
    endless.eos_token = None
    for tokenizer in (None, endless):
        with pytest.raises(RequestError, match="needs a tokenizer whose tokens"):
            Grammars(tokenizer, frozenset()).constraint(Grammar("start: /a/", "guided_regex"))


def test_the_demo_backbone_keeps_forms_to_its_own_end_token() -> None:
    with TorchEngine.load(DEMO_BANK / "backbone", dtype="float32") as engine:
        ids = tuple(engine.tokenizer("hello")["input_ids"])
        schema = {
            **SCHEMA,
            "properties": {**SCHEMA["properties"], "b": {"type": "string", "maxLength": 8}},
        }
        for seed in range(3):
            sampling = SamplingParams(max_tokens=200, seed=seed)
            grammar = Grammar(json_grammar(schema), "response_format")
            events = list(engine.submit(GenerationRequest(ids, sampling=sampling, grammar=grammar)))
            assert events[-1].finish_reason is FinishReason.STOP
            assert jsonschema_rs.is_valid(schema, json.loads(text_of(events)))
        free = GenerationRequest(
            ids,
            sampling=SamplingParams(max_tokens=200, seed=1, logit_bias={4: 20.0}),
            grammar=Grammar(regex_grammar("[a-z]+"), "guided_regex"),
        )
        assert list(engine.submit(free))[-1].token_id in end_tokens(engine.model)
