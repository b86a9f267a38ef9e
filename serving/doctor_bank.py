"""Checks of a bank: modules, router, tokenizer, and which engines can serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapters.bank import Bank, BankModule
from ..adapters.digest import short
from ..adapters.errors import MergerouteError
from ..adapters.kinds import empty_model
from ..adapters.lora import Module
from ..adapters.module_files import INT8_FILE
from ..routers.loading import load_router
from ..routers.store import modules_of
from ..runtime.footprint import Room
from ..runtime.grammar import Grammars
from ..runtime.loading import choose_device, choose_dtype, context_length, load_tokenizer
from ..runtime.types import Grammar
from .chat import chat_prompt
from .doctor_memory import footprints
from .findings import Finding, required
from .formats.tool_parsers import detect_syntax, template_of
from .schemas.messages import Message
from .settings import ServeSettings

_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}


@dataclass
class Examined:
    """A bank that was looked at. modules: those that can be loaded, the shared one among them.

    is_sound: whether nothing in it is at fault.
    """

    bank: Bank
    modules: list[Module] = field(default_factory=list)
    is_sound: bool = True


def check_bank(bank: Bank, settings: ServeSettings) -> Iterator[Finding | Examined]:
    """Everything that can be told of an opened bank without its backbone's weights; at last what
    may be loaded.

    Raises:
        FaultError: the backbone cannot be served.
    """
    subject = f"bank {bank.name}"
    config = required(subject, lambda: empty_model(bank.backbone.path)).config
    length = required(subject, lambda: context_length(config, settings.max_length))
    yield Finding(
        "ok",
        subject,
        f"{short(bank.digest)}, verified: {len(bank.modules)} modules on {bank.backbone.name}, "
        f"{type(config).__name__.removesuffix('Config')}, context {length:,}",
    )
    examined = Examined(bank)
    findings = [*_modules(examined, settings), *_router(bank), *_tokenizer(bank, settings)]
    examined.is_sound = all(finding.level != "error" for finding in findings)
    yield from findings
    yield examined


def _modules(examined: Examined, settings: ServeSettings) -> Iterator[Finding]:
    bank, room = examined.bank, None
    if settings.module_memory is not None:
        dtype = choose_dtype(settings.dtype, choose_device(settings.device))
        model = empty_model(bank.backbone.path).to(dtype)
        room = Room.of(model, bank.backbone.shapes, settings.module_memory)
    shared = [bank.shared] if bank.shared else []
    for entry in (*shared, *bank.modules):
        subject = f"module {bank.name}:{entry.name}"
        try:
            module = bank.load(entry)
        except MergerouteError as error:
            yield Finding("error", subject, str(error))
            continue
        examined.modules.append(module)
        yield Finding("ok", subject, str(module.coverage(bank.backbone.layers)))
        asked = footprints([module], bank.backbone.shapes)
        if room and not room.fits(asked):
            yield Finding(
                "error",
                subject,
                f"needs {room.needed(asked):,} bytes of memory, the budget is {room.budget:,} "
                "(module_memory): raise it",
            )
    yield from _for_vllm(bank, examined.modules)


def _for_vllm(bank: Bank, modules: Sequence[Module]) -> Iterator[Finding]:
    """vLLM reads PEFT's factors of linear layers, and nothing else."""
    reasons = [
        f"{module.name} changes {what}"
        for module in modules
        for what in (
            *(("embeddings",) if module.embeddings else ()),
            *(("norms or biases",) if module.vectors else ()),
        )
    ]
    entries: list[BankModule] = [*([bank.shared] if bank.shared else []), *bank.modules]
    reasons += [f"{e.name} is int8" for e in entries if (e.path / INT8_FILE).is_file()]
    if not modules:
        return
    subject = f"bank {bank.name}"
    if reasons:
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        yield Finding(
            "note",
            subject,
            f"for the torch engine alone, vLLM would refuse it ({reasons[0]}{more}): build it with "
            "modules of bfloat16 and with embeddings and norms shared, if vLLM is to serve it",
        )
    else:
        yield Finding("ok", subject, "modules are PEFT folders as vLLM and others read them")


def _router(bank: Bank) -> Iterator[Finding]:
    subject = f"router {bank.name}"
    folder = bank.router_path
    if folder is None:
        yield Finding("note", subject, "none: `auto` answers from the backbone")
        return
    try:
        load_router(folder, encode=_not_run, backbone=bank.backbone.digest)
        unknown = set(modules_of(folder)) - {module.name for module in bank.modules}
    except MergerouteError as error:
        yield Finding("error", subject, str(error))
        return
    if unknown:
        fault = f"it names {min(unknown)!r}, which the bank lacks: fit the router again"
        yield Finding("error", subject, fault)
    else:
        yield Finding("ok", subject, "was fitted on this backbone, and names its modules alone")


def _not_run(*_: Any, **__: Any) -> Any:  # noqa: ANN401
    raise AssertionError("a router is read here, and not run")


def _tokenizer(bank: Bank, settings: ServeSettings) -> Iterator[Finding]:
    subject = f"tokenizer {bank.name}"
    try:
        tokenizer = load_tokenizer(bank.backbone.path)
    except MergerouteError as error:
        yield Finding("error", subject, str(error))
        return
    try:
        Grammars(tokenizer, frozenset()).constraint(Grammar('start: "a"', "response_format"))
        yield Finding("ok", subject, "answers can be kept to a form (response_format, tools)")
    except MergerouteError as error:
        yield Finding("warning", subject, str(error))
    yield _chats(tokenizer, subject, settings)


def _chats(tokenizer: Any, subject: str, settings: ServeSettings) -> Finding:  # noqa: ANN401
    """Chats and tools as a request for them would find out."""
    said = [Message(role="user", content="x")]
    plain = {"add_generation_prompt": True, "continue_final_message": False}
    try:
        chat_prompt(tokenizer, said, plain)
    except MergerouteError as error:
        return Finding("warning", subject, str(error))
    if settings.tool_parser == "none":
        return Finding("note", subject, "chats work; tools are switched off (tool_parser: none)")
    try:
        chat_prompt(tokenizer, said, {**plain, "tools": [_TOOL]})
    except MergerouteError as error:
        return Finding("note", subject, f"chats work, those with tools will be refused: {error}")
    if settings.tool_parser == "auto" and detect_syntax(template_of(tokenizer)) is None:
        return Finding(
            "note",
            subject,
            "chats work, those with tools will be refused: the chat template does not show how "
            "calls are spelled; name it (tool_parser)",
        )
    return Finding("ok", subject, "chats work, with tools too")
