"""Modules on servers: what is known of who serves which, and what is told where none does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import ModuleUnavailableError
from mergeroute.runtime.vllm.blends import module_key
from mergeroute.runtime.vllm.engine import VllmEngine

from ...tiny import make_model, make_module
from .fake import Fake
from .fleet import BODY, engine_on, run, wait_for, write_backbone


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[VllmEngine, list[Fake]]]:
    fakes = [Fake(folder=tmp_path / "modules") for _ in range(2)]
    with engine_on(write_backbone(tmp_path / "tiny"), tmp_path / "modules", fakes) as engine:
        yield engine, fakes


def test_a_server_that_lacks_one_module_keeps_the_others(
    running: tuple[VllmEngine, list[Fake]],
) -> None:
    engine, fakes = running
    engine.load_module(make_module(make_model(), "a"))
    engine.load_module(make_module(make_model(), "b", seed=1))
    one, other = engine.modules.wanted
    for fake in fakes:
        fake.lacks.add(module_key(one))
    with pytest.raises(ModuleUnavailableError, match=f"not registered: {module_key(one)}"):
        run(engine, BODY, blend=Blend({one: 0.5, other: 0.5}))
    assert all(other in replica.modules for replica in engine.replicas)
    assert not any(one in replica.modules for replica in engine.replicas)


def test_a_module_that_no_server_loads_is_not_said_to_be_loaded(
    running: tuple[VllmEngine, list[Fake]],
) -> None:
    engine, fakes = running
    module = make_module(make_model(), "full", seed=2)
    for fake in fakes:
        fake.loading = "429"
    with pytest.raises(
        ModuleUnavailableError, match=r"loaded the module 'full' \(told to load not"
    ):
        engine.load_module(module)
    assert engine.modules.wanted == ()
    fakes[0].loading = ""
    digest = engine.load_module(module)
    assert [digest in replica.modules for replica in engine.replicas] == [True, False]
    fakes[1].loading = ""
    wait_for(lambda: all(digest in replica.modules for replica in engine.replicas))


def test_a_server_that_is_away_has_no_slots(running: tuple[VllmEngine, list[Fake]]) -> None:
    engine, fakes = running
    most = engine.options.max_concurrency
    assert engine.stats().slots == 2 * most
    for number, fake in enumerate(fakes):
        fake.is_ill = True
        wait_for(lambda: len(engine.replicas.ready) == 1 - number)  # noqa: B023 - called at once
        assert engine.stats().slots == most  # at the least: shares are told of it
