"""Shadows and replay of bodies that are passed on to other servers as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.vllm.options import VllmOptions
from mergeroute.serving.experiments.live import LiveExperiments
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.state import StateFolder
from mergeroute.serving.service import Service, ServiceOptions

from ...runtime.vllm.fake import Fake, upstream
from ...runtime.vllm.fleet import QUICK
from ..conftest import running
from .lab import Lab, eventually
from .recorded import shadow_pairs_of


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(folder=tmp_path / "modules")


@pytest.fixture
def served(bank: Bank, fake: Fake, tmp_path: Path) -> Iterator[Lab]:
    folder = tmp_path / "state"
    with ExitStack() as stack:
        url = stack.enter_context(upstream(fake))
        servers = VllmOptions(urls=(url,), modules_folder=tmp_path / "modules", **QUICK)
        placement = Placement(dtype="float32", options=EngineOptions(), servers=servers)
        hosted, state = host_banks([bank], placement), StateFolder(folder)
        live = LiveExperiments(None, folder)
        service = Service(hosted, ServiceOptions(), state, live)
        address = stack.enter_context(running(service))
        http = stack.enter_context(httpx.Client(base_url=address, timeout=60, trust_env=False))
        client = stack.enter_context(openai.OpenAI(base_url=address, api_key="none"))
        yield Lab(address, service, live, folder, http, client)


def test_the_same_body_and_seed_are_passed_on_again(served: Lab, fake: Fake) -> None:
    variants = [
        {"name": "old", "target": "zoo:upper", "weight": 0.9999, "control": True},
        {"name": "new", "target": "zoo:digit", "weight": 0.0001},
    ]
    shadow = {"variant": "new", "share": 1}
    served.begin(variants=variants, shadow=shadow, store_requests=True)
    answer = served.chat("trial", "u1", max_tokens=4, temperature=1, stream=True, top_p=0.9)
    assert answer.status_code == 200, answer.text
    assert eventually(lambda: shadow_pairs_of(served.live.store, "trial"))
    own, shadowed = (body for body in fake.seen if "messages" in body)
    assert own["seed"] == shadowed["seed"]
    assert own["model"] != shadowed["model"]
    assert own["top_p"] == shadowed["top_p"] == 0.9
    assert shadowed.get("stream", False) is False
    response = served.call("POST", "/v1/replay", {"request_id": answer.headers["x-request-id"]})
    assert response.status_code == 200, response.text
    again = fake.seen[-1]
    assert (again["seed"], again["model"]) == (own["seed"], own["model"])
    assert response.json()["is_equal"] is True, response.text
