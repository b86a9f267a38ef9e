"""A tiny Llama that vLLM can serve, modules for it, and one server a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.vllm.launch import PluginOptions
from mergeroute.runtime.vllm.store import ModuleStore
from tests.runtime.vllm.server import VllmServer, running
from tests.tiny import make_model, make_module, make_tokenizer

SLOTS, RANK = 4, 8
NAMES = ("m0", "m1", "m2")


@pytest.fixture(scope="session")
def model() -> Any:
    """Heads of 32: vLLM's attention on CPUs takes no smaller ones."""
    return make_model("llama", hidden_size=128, intermediate_size=96, head_dim=32)


@pytest.fixture(scope="session")
def shapes(model: Any) -> Shapes:
    return Shapes.of(model)


@pytest.fixture(scope="session")
def modules(model: Any) -> dict[str, Module]:
    """Ranks differ, and one module is of the largest."""
    ranks = {"m0": 4, "m1": 6, "m2": 8}
    return {
        name: make_module(model, name, rank=ranks[name], seed=k + 1, scale=0.15)
        for k, name in enumerate(NAMES)
    }


@pytest.fixture(scope="session")
def backbone(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def options(
    modules: dict[str, Module], shapes: Shapes, tmp_path_factory: pytest.TempPathFactory
) -> PluginOptions:
    """With the modules registered, and one slot left."""
    found = PluginOptions(tmp_path_factory.mktemp("modules"), slots=SLOTS, rank=RANK)
    for module in modules.values():
        found.store.add(module, shapes)
    return found


@pytest.fixture(scope="session")
def store(options: PluginOptions) -> ModuleStore:
    return options.store


@pytest.fixture(scope="session")
def server(
    backbone: Path, options: PluginOptions, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with running(backbone, options, log) as found:
        yield found
