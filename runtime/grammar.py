"""Answers of a given form: which tokens may come next."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from ..adapters.errors import RequestError
from .types import Grammar

MAX_GRAMMAR_BYTES = 128 << 10
_KEPT = 64
_PROBED = 4
_JSON_FAULT = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: ")
_REASON = re.compile(r"^error: (.+)$", re.MULTILINE)


class Constraint:
    """One sequence on its way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """Whether the form is complete and nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def fault(self) -> str:
        """Why it went wrong, in a line; empty while it has not."""
        return _in_a_line(self._matcher.get_error())

    def take(self, token_id: int) -> bool:
        """Go on by a token; False where the form does not allow it, or its limits are exceeded."""
        return self._matcher.consume_token(token_id)

    def mask(self) -> bytes:
        """A bit per token of the tokenizer, the first one lowest: whether it may come next.

        After a fault every token may: `take` will say that something is wrong.
        """
        bits = self._matcher.compute_bitmask()
        return b"\xff" * len(bits) if self._matcher.is_error() else bits


def allowed_tokens(constraints: Sequence[Constraint], logits: Tensor) -> Tensor:
    """Which tokens may come next, bool [n, vocabulary]; ids beyond the tokenizer's never.

    logits: [n, vocabulary]; only its shape and device count.
    """
    joined = b"".join([constraint.mask() for constraint in constraints])
    packed = np.frombuffer(joined, dtype=np.uint8).reshape(len(constraints), -1)
    known = np.unpackbits(packed, axis=1, bitorder="little")[:, : logits.shape[1]]
    allowed = torch.zeros(logits.shape, dtype=torch.bool)
    allowed[:, : known.shape[1]] = torch.from_numpy(known)
    return allowed.to(logits.device)


class Grammars:
    """Compiles grammars for one tokenizer, one at a time, and keeps the latest. Thread-safe.

    tokenizer: a fast transformers tokenizer; None: grammars are refused.
    end_tokens: the model's; without any, the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int]) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._compiled: OrderedDict[str, LLMatcher | str] = OrderedDict()  # or what is wrong
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """A new sequence's; takes up to seconds where the grammar has not been seen before.

        Raises:
            RequestError: the grammar is at fault, or the tokenizer cannot be constrained.
        """
        made = self._known(grammar)
        if made is None:
            with self._compiling:
                made = self._known(grammar) or self._compile(grammar)
                self._keep(grammar, made)
        if isinstance(made, str):
            raise RequestError(
                f"{grammar.parameter} cannot be kept to: {made}", parameter=grammar.parameter
            )
        return Constraint(made.deep_copy())

    def _known(self, grammar: Grammar) -> LLMatcher | str | None:
        with self._lock:
            matcher = self._compiled.get(grammar.text)
            if matcher is not None:
                self._compiled.move_to_end(grammar.text)
            return matcher

    def _keep(self, grammar: Grammar, made: LLMatcher | str) -> None:
        with self._lock:
            self._compiled[grammar.text] = made
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        """The grammar's matcher, or what is wrong with the grammar, in a line."""
        size = len(grammar.text.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"{grammar.parameter} makes a grammar of {size:,} bytes, the limit is "
                f"{MAX_GRAMMAR_BYTES:,}: simplify it",
                parameter=grammar.parameter,
            )
        matcher = LLMatcher(
            self._vocabulary(grammar.parameter), grammar.text, log_level=0, limits=_limits()
        )
        fault = matcher.get_error() or _early_fault(matcher)
        return _in_a_line(fault) if fault else matcher

    def _vocabulary(self, parameter: str) -> LLTokenizer:
        try:
            return self._tokens
        except (ValueError, RuntimeError) as error:
            raise RequestError(
                f"{parameter} needs a tokenizer whose tokens can be read as bytes, and the "
                f"backbone's cannot be ({error}): leave it out, or use another backbone",
                parameter=parameter,
            ) from error

    @cached_property
    def _tokens(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer  # imports transformers

        if self._tokenizer is None:
            raise ValueError("there is none")
        size = len(self._tokenizer)
        ends = [token for token in sorted(self._end_tokens) if token < size]
        if not ends and self._tokenizer.eos_token_id is None:
            raise ValueError("it has no end token")
        return from_tokenizer(self._tokenizer, eos_token=ends or [self._tokenizer.eos_token_id])


def _early_fault(matcher: LLMatcher) -> str:
    """What goes wrong in the first steps of one answer: most of what is too large does so here,
    where only the one who asked waits.
    """
    matcher.compute_bitmask()
    probe = matcher.deep_copy()
    for _ in range(_PROBED):
        bits = probe.compute_bitmask()
        allowed = next((8 * at + (b & -b).bit_length() - 1 for at, b in enumerate(bits) if b), 0)
        if probe.is_error() or probe.is_stopped() or not probe.consume_token(allowed):
            break
    return probe.get_error()


def _limits() -> LLParserLimits:
    """Tighter than llguidance's own where a step would hold up the whole batch."""
    return LLParserLimits(
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _in_a_line(message: str) -> str:
    """Its first line, and the reason that llguidance adds below where a regex does not parse."""
    first = _JSON_FAULT.sub("", message.split("\n", 1)[0])
    if first == "NoExtensionBias":  # its word for a start from which no token leads on
        return "nothing can match it"
    reason = _REASON.search(message)
    return f"{first.removesuffix(':')}: {reason[1]}" if reason else first
