"""One bank served by each engine in turn: what clients may rely on, whatever runs the models.

The torch engine is a part of every run; vLLM's is a real server, under the marker `vllm`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.vllm.options import VllmOptions
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service, ServiceOptions

from ..serving.conftest import running
from ..tiny import make_model, make_module, make_tokenizer, reference_tokens

WORDS = ("loud", "terse")
LATE = "late"


@dataclass(frozen=True)
class Conforming:
    """A running gateway. url: without the /v1. model: the backbone, for references."""

    kind: str
    url: str
    service: Service
    client: openai.OpenAI
    http: httpx.Client
    model: Any
    modules: dict[str, Module]
    folder: Path

    def expected(self, prompt: str, blend: dict[str, float], count: int) -> str:
        """What the merged model says, greedily."""
        ids = make_tokenizer()(prompt)["input_ids"]
        tokens = reference_tokens(self.model, self.modules, Blend(blend), ids, count)
        text: str = make_tokenizer().decode(tokens, skip_special_tokens=True)
        return text

    def work(self) -> tuple[float, float]:
        """Requests that the engine works on now, and tokens that it ever computed: as the server
        itself tells, where there is one.
        """
        hosted = self.service.hosted[0]
        if hosted.upstream is None:
            stats = hosted.engine.stats()
            return stats.running, stats.generated_tokens
        (replica,) = hosted.upstream.replicas
        with replica.endpoint.client(timeout_s=30) as client:
            lines = client.get("/metrics").text.splitlines()
        names = ("vllm:num_requests_running", "vllm:generation_tokens_total")
        running, generated = (
            sum(float(line.split()[-1]) for line in lines if line.startswith(name))
            for name in names
        )
        return running, generated


def _modules(model: Any) -> dict[str, Module]:
    return {
        name: make_module(model, name, seed=k + 1, scale=0.15)
        for k, name in enumerate((*WORDS, LATE))
    }


def _bank(folder: Path, model: Any, modules: dict[str, Module]) -> Bank:
    model.save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    for name, module in modules.items():
        module.save(folder / "loras" / name)
    entries = [BankModule(name, folder / "loras" / name) for name in WORDS]
    backbone = Backbone.open(folder / "tiny")
    return write_bank(folder / "pair", name="pair", backbone=backbone, modules=entries)


def _servers(kind: str) -> VllmOptions | None:
    if kind == "torch":
        return None
    if not (Path(sys.executable).parent / "vllm").is_file():
        pytest.fail("vLLM is not installed here: make test-vllm")
    return VllmOptions(flags={"max_num_batched_tokens": 512}, start_s=280)


@pytest.fixture(scope="session", params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def conforming(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Conforming]:
    """Heads of 32: vLLM's attention on CPUs takes no smaller ones."""
    folder = tmp_path_factory.mktemp("conformance")
    model = make_model("llama", hidden_size=128, intermediate_size=96, head_dim=32)
    modules = _modules(model)
    bank = _bank(folder, model, modules)
    placement = Placement(
        dtype="float32",
        options=EngineOptions(max_concurrency=8, max_length=256),
        servers=_servers(request.param),
    )
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        options = ServiceOptions(module_roots=(folder / "loras",))
        service = Service(host_banks([bank], placement), options)
        url = stack.enter_context(running(service))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        stack.enter_context(client)
        http = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        yield Conforming(request.param, url, service, client, http, model, modules, folder)
    shutil.rmtree(folder, ignore_errors=True)
