"""A small real bank, and a real server on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
import uvicorn

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.routers.base import Query
from mergeroute.routers.learned import Fitted
from mergeroute.routers.loading import signal_of
from mergeroute.routers.settings import (
    EnsembleSettings,
    LearnedSettings,
    RouterSettings,
    RulesSettings,
    SignalSettings,
)
from mergeroute.routers.store import save_router
from mergeroute.routers.training import Labelled, fit
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.access.guard import EVERYBODY, Policy
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.server import bind, configuration
from mergeroute.serving.service import Service
from mergeroute.serving.telemetry.options import QUIET, Telemetry

from ..tiny import make_model, make_module, make_tokenizer

WORDS = {"upper": "shout the word", "digit": "0 1 2 3 4"}
"""Two modules, and how prompts for them begin."""


def write_checkpoint(folder: Path, *, seed: int = 0) -> Backbone:
    """A tiny random model with a byte tokenizer and a chat template."""
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Backbone.open(folder)


def chat_ids(backbone: Backbone, text: str) -> tuple[int, ...]:
    """A user message as the router sees it."""
    ids = make_tokenizer().apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return tuple(ids)


def write_routed_bank(folder: Path, *, name: str, backbone: Backbone, seed: int = 0) -> Bank:
    """A bank with a module per entry of WORDS and a router fitted on prompts that begin so."""
    return _write_bank(folder, learned(backbone), fit_words(backbone), name, backbone, seed)


def write_ruled_bank(folder: Path, *, name: str, backbone: Backbone) -> Bank:
    """The same with rules before what was fitted."""
    rules = [
        {"keyword": "certainly", "module": "upper"},
        {"header": {"x-team": "Digits"}, "module": "digit"},
        {"metadata": {"tier": "iron"}},
    ]
    ruled = RulesSettings.model_validate({"rules": rules})
    settings = EnsembleSettings(members=(ruled, learned(backbone)))
    return _write_bank(folder, settings, {1: fit_words(backbone)}, name, backbone, 0)


def learned(backbone: Backbone) -> LearnedSettings:
    """Prototypes of hidden states after the first layer."""
    signal = SignalSettings(layer=1, pooling="mean", ngrams=0)
    return LearnedSettings(modules=tuple(WORDS), signal=signal, backbone=backbone.digest)


def fit_words(backbone: Backbone) -> Fitted:
    """Fitted on 40 prompts for each of WORDS."""
    examples = [
        Labelled(Query.of(chat_ids(backbone, f"{words} {k}")), module_name)
        for module_name, words in WORDS.items()
        for k in range(40)
    ]
    with TorchEngine.load(backbone.path, dtype="float32") as engine:
        signal = signal_of(learned(backbone).signal, encode=engine.encode)
        return fit("prototype", signal, examples, modules=tuple(WORDS))


def _write_bank(
    folder: Path,
    settings: RouterSettings,
    fitted: Mapping[int, Fitted] | Fitted,
    name: str,
    backbone: Backbone,
    seed: int,
) -> Bank:
    modules = []
    for index, module_name in enumerate(WORDS):
        path = folder.parent / f"{folder.name}-loras" / module_name
        make_module(make_model(), module_name, seed=seed + index + 1).save(path)
        modules.append(BankModule(module_name, path, description=f"Prompts like {module_name}"))
    return write_bank(
        folder,
        name=name,
        backbone=backbone,
        modules=modules,
        write_router=lambda path: save_router(path, settings, fitted=fitted),
    )


@dataclass(frozen=True)
class Served:
    """A running server. url: without the /v1."""

    url: str
    service: Service
    bank: Bank
    openai_client: openai.OpenAI

    def client(self) -> openai.OpenAI:
        """An unmodified OpenAI client."""
        return self.openai_client


def torch_engine(service: Service) -> TorchEngine:
    """The engine of the default bank, with its model."""
    engine = service.hosted[0].engine
    assert isinstance(engine, TorchEngine)
    return engine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory, checkpoint: Backbone) -> Bank:
    return write_routed_bank(
        tmp_path_factory.mktemp("banks") / "zoo", name="zoo", backbone=checkpoint
    )


@pytest.fixture(scope="session")
def served(bank: Bank) -> Iterator[Served]:
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
    service = Service(host_banks([bank], placement))
    with (
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(url, service, bank, client)


class running:
    """Serve in a thread for the length of a block; the block gets the URL."""

    def __init__(
        self, service: Service, policy: Policy = EVERYBODY, telemetry: Telemetry = QUIET
    ) -> None:
        self._socket = bind("127.0.0.1", 0)
        self._server = uvicorn.Server(configuration(service, policy, telemetry))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self) -> str:
        torch.set_num_threads(1)
        self._thread.start()
        host, port = self._socket.getsockname()
        return f"http://{host}:{port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
