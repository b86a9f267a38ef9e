"""Routes about text alone: tokens, and embeddings from the backbone's hidden state."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters.errors import RequestError
from ..runtime.types import GenerationRequest, SamplingParams
from .access.checks import check_text
from .access.limits import Limits
from .access.permissions import resolve_for
from .chat import chat_prompt, text_prompt
from .context import Context
from .errors import CLIENT_CLOSED, ApiError
from .hosted import HostedBank
from .schemas.texts import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .service import Service
from .terms import Terms, in_time, terms_of
from .validation import read_body

MAX_EMBEDDED_TOKENS = 300_000
"""Of all inputs of one request, as at OpenAI."""

_GROUP_TOKENS = 2048
"""Tokens that are embedded before it is another request's turn."""

TokenIds = tuple[int, ...]


def add_text_routes(app: FastAPI, service: Service) -> None:
    """Let clients of an application tokenize, detokenize and embed."""
    turn = asyncio.Lock()  # one group at a time, whoever asks: routing shares these threads

    def hosted(request: Request, model: str) -> HostedBank:
        return resolve_for(request.state.caller, service.targets, model).hosted

    def terms(request: Request) -> Terms:
        context = Context(request.headers, request.state.caller, request.state.request_id)
        return terms_of(context, service.pressure.request_timeout_seconds)

    async def embedded(request: Request, hosted: HostedBank, group: list[TokenIds]) -> Tensor:
        """One group, in its turn, which then ends; it is charged even where nobody waits for it."""
        try:
            found = await asyncio.to_thread(hosted.engine.embed, group)
            if request.state.account:
                request.state.account.charge(sum(map(len, group)))
            return found
        finally:
            turn.release()

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, TokenizeRequest)
        if body.messages is None:
            check_text("prompt", len(body.prompt or ""), service.limits)
        else:
            characters = sum(len(message.text) for message in body.messages)
            check_text("messages", characters, service.limits)
        work = asyncio.to_thread(_tokenized, body, hosted(request, body.model))
        return await in_time(work, terms(request))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, DetokenizeRequest)
        return await asyncio.to_thread(_detokenized, body, hosted(request, body.model))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        body = await read_body(request, EmbeddingRequest)
        until = terms(request)
        target = resolve_for(request.state.caller, service.targets, body.model)
        if target.blend:
            raise ApiError(
                f"embeddings are the backbone's alone, and {body.model!r} names a module: ask for "
                f"{target.hosted.bank.backbone.name!r}",
                param="model",
            )
        work = asyncio.to_thread(_embeddable, body, target.hosted, service.limits)
        prompts = await in_time(work, until)
        found: list[Tensor] = []
        for group in _groups(prompts):
            if await request.is_disconnected():
                raise ApiError("the client closed the connection", status=CLIENT_CLOSED)
            await in_time(turn.acquire(), until)
            found += await in_time(asyncio.shield(embedded(request, target.hosted, group)), until)
        tokens = sum(map(len, prompts))
        request.state.record.embed(body.model, tokens)
        return _embedded(body, found, tokens)


def _tokenized(body: TokenizeRequest, hosted: HostedBank) -> dict[str, Any]:
    tokenizer = hosted.tokenizer
    if body.messages is not None:
        ids = list(chat_prompt(tokenizer, body.messages, body.template_arguments).token_ids)
    else:
        adds = body.add_special_tokens is not False
        ids = tokenizer(body.prompt, add_special_tokens=adds)["input_ids"]
    return {
        "count": len(ids),
        "max_model_len": hosted.engine.max_length,
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
    }


def _detokenized(body: DetokenizeRequest, hosted: HostedBank) -> dict[str, Any]:
    vocabulary = hosted.engine.vocabulary
    for token in body.tokens:
        if not 0 <= token < vocabulary:
            raise ApiError(
                f"tokens holds {token}, the vocabulary has 0 to {vocabulary - 1}", param="tokens"
            )
    return {"prompt": hosted.tokenizer.decode(list(body.tokens))}


def _embeddable(body: EmbeddingRequest, hosted: HostedBank, limits: Limits) -> list[TokenIds]:
    """The inputs' tokens.

    Raises:
        ApiError, RequestError: an input is empty or too long, or all together are.
    """
    check_text("input", max(map(len, body.inputs)), limits)
    _check_dimensions(body, hosted)
    prompts = [text_prompt(hosted.tokenizer, one).token_ids for one in body.inputs]
    try:
        for prompt in prompts:
            hosted.engine.check(GenerationRequest(prompt, sampling=_NOTHING))
    except RequestError as error:
        error.parameter = "input"
        raise
    if (total := sum(map(len, prompts))) > MAX_EMBEDDED_TOKENS:
        raise ApiError(
            f"input comes to {total:,} tokens, the limit is {MAX_EMBEDDED_TOKENS:,}: ask for fewer "
            "inputs at a time",
            param="input",
        )
    return prompts


_NOTHING = SamplingParams(max_tokens=0, prompt_logprobs=0)
"""A request that generates nothing may fill the context."""


def _check_dimensions(body: EmbeddingRequest, hosted: HostedBank) -> None:
    width = hosted.engine.width
    if body.dimensions is not None and body.dimensions > width:
        raise ApiError(
            f"dimensions is {body.dimensions}, this backbone's embeddings have {width}",
            param="dimensions",
        )


def _groups(prompts: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    """Neighbours that make up at most `_GROUP_TOKENS`, or one longer prompt."""
    group: list[TokenIds] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > _GROUP_TOKENS:
            yield group
            group = []
        group.append(prompt)
    yield group


def _embedded(body: EmbeddingRequest, found: Sequence[Tensor], tokens: int) -> dict[str, Any]:
    vectors = [normalize(vector[: body.dimensions].cpu(), dim=0).tolist() for vector in found]
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector if body.encoding_format == "float" else _base64(vector),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: Sequence[float]) -> str:
    """float32, little-endian, as OpenAI's client reads it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
