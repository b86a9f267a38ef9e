"""What is refused before it is admitted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..adapters.errors import ContextLengthError, RequestError
from .types import GenerationRequest


@dataclass(frozen=True)
class Admission:
    """The limits that a request must keep.

    max_length: most tokens of prompt and completion. vocabulary: number of token ids.
    has_tokenizer: whether stop texts can be found.
    """

    max_length: int
    vocabulary: int
    has_tokenizer: bool

    def _check_prompt(self, prompt_ids: Sequence[int], *, needs_room: bool) -> None:
        length = len(prompt_ids)
        if not length:
            raise RequestError("the prompt is empty: give at least one token", parameter="prompt")
        if length > self.max_length or (length == self.max_length and needs_room):
            raise ContextLengthError(
                f"the prompt is {length:,} tokens, the limit is {self.max_length - needs_room:,} "
                f"to leave room for an answer in {self.max_length:,} (max_length): shorten it",
                parameter="prompt",
            )
        self._check_ids(prompt_ids, parameter="prompt")

    def check(self, request: GenerationRequest) -> int:
        """Refuse a request that cannot run; returns how many tokens it may generate.

        Raises:
            ContextLengthError: the prompt leaves no room, or not enough for `max_tokens`.
            RequestError: another fault; `parameter` names it.
        """
        length, wanted = len(request.prompt_ids), request.sampling.max_tokens
        self._check_prompt(request.prompt_ids, needs_room=wanted != 0)
        if wanted is not None and length + wanted > self.max_length:
            raise ContextLengthError(
                f"the prompt is {length:,} tokens and max_tokens is {wanted:,}, together they may "
                f"be {self.max_length:,} (max_length): lower one of them",
                parameter="max_tokens",
            )
        self._check_ids(request.sampling.logit_bias, parameter="logit_bias")
        self._check_ids(request.sampling.stop_token_ids, parameter="stop_token_ids")
        if request.sampling.stop and not self.has_tokenizer:
            raise RequestError("stop texts need a tokenizer: use stop_token_ids", parameter="stop")
        return self.max_length - length if wanted is None else wanted

    def _check_ids(self, token_ids: Iterable[int], *, parameter: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocabulary:
                raise RequestError(
                    f"{parameter} holds token {token_id}, the vocabulary has 0 to "
                    f"{self.vocabulary - 1}",
                    parameter=parameter,
                )
