"""A gateway in front of fake servers of vLLM, with the small routed bank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.vllm.blends import module_key
from mergeroute.runtime.vllm.options import VllmOptions
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service, ServiceOptions

from ...runtime.vllm.fake import Fake, upstream
from ...runtime.vllm.fleet import QUICK, wait_for
from ..conftest import running


@dataclass(frozen=True)
class Gateway:
    """A running gateway. url: without the /v1. fakes: its servers."""

    url: str
    service: Service
    bank: Bank
    fakes: list[Fake]
    openai_client: openai.OpenAI
    http: httpx.Client

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def key(self, module: str) -> str:
        """What servers call a module."""
        return module_key(self.service.hosted[0].digests[module])

    @property
    def seen(self) -> list[dict[str, object]]:
        """Bodies that came to any server."""
        return [body for fake in self.fakes for body in fake.seen]

    def reset(self) -> None:
        """As at the start."""
        for fake in self.fakes:
            fake.reset()
        (engine,) = {host.upstream for host in self.service.hosted}
        assert engine is not None
        wait_for(lambda: len(engine.replicas.ready) == len(self.fakes))
        wanted = set(engine.modules.wanted)
        wait_for(lambda: all(wanted <= replica.modules for replica in engine.replicas))
        for replica in engine.replicas:
            replica.breaker.reset()


@pytest.fixture(scope="module")
def shared_gateway(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with ExitStack() as stack:
        fakes = [Fake(folder=folder / "modules") for _ in range(2)]
        urls = tuple(stack.enter_context(upstream(fake)) for fake in fakes)
        servers = VllmOptions(
            urls=urls,
            modules_folder=folder / "modules",
            **{**QUICK, "first_s": 1.0, "next_s": 1.0, "whole_s": 1.0},
        )
        placement = Placement(dtype="float32", options=EngineOptions(), servers=servers)
        options = ServiceOptions(module_roots=(bank.modules[0].path.parents[0],))
        service = Service(host_banks([bank], placement), options)
        url = stack.enter_context(running(service))
        client = stack.enter_context(
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        )
        http = stack.enter_context(httpx.Client(base_url=url, timeout=30, verify=False))
        yield Gateway(url, service, bank, fakes, client, http)


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


@pytest.fixture
def loras(bank: Bank) -> Path:
    """Where the bank's modules were written from."""
    return bank.modules[0].path.parents[0]
