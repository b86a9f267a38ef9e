"""What a server that cannot serve blends says before it ends, and the way that needs no seams."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.adapters.shapes import Shapes
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.types import GenerationRequest, SamplingParams
from mergeroute.runtime.vllm.blends import lora_name
from mergeroute.runtime.vllm.engine import VllmEngine
from mergeroute.runtime.vllm.launch import PluginOptions
from mergeroute.runtime.vllm.options import VllmOptions
from tests.runtime.vllm.conftest import RANK, SLOTS
from tests.runtime.vllm.server import BASE, VllmServer, environment, running
from tests.tiny import make_prompt, reference_tokens

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what `import vllm` imports
]

BREAKER = """
def register():
    from mergeroute.runtime.vllm.wrapper_cpu import BlendWrapperCPU

    right = BlendWrapperCPU.set_weights
    BlendWrapperCPU.set_weights = lambda self, rows, places: right(self, rows * 1.01, places)
"""


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """An installed distribution that holds nothing but metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
    (info / "entry_points.txt").write_text(entry_points)


def break_blends(folder: Path) -> None:
    """Install the breaker there."""
    (folder / "breaker.py").write_text(BREAKER)
    distribution(folder, "breaker", "1.0", "[vllm.general_plugins]\nbreaker = breaker:register\n")


def why_it_ended(backbone: Path, options: PluginOptions, folder: Path, *more: str) -> str:
    """What a server wrote that does not start; folder: is looked into before what is installed."""
    log = folder / "vllm.log"
    with (
        pytest.raises(AssertionError, match="vLLM ended"),
        running(backbone, options, log, *more, variables={"PYTHONPATH": str(folder)}),
    ):
        pass
    return log.read_text()


def test_a_vllm_that_was_not_tested_does_not_start(
    backbone: Path, options: PluginOptions, tmp_path: Path
) -> None:
    distribution(tmp_path, "vllm", "9.9+cpu")
    said = why_it_ended(backbone, options, tmp_path)
    assert "mergeroute: vLLM 9.9+cpu was not tested for blends" in said
    assert "MERGEROUTE_VLLM_MODE=materialise" in said


def test_blends_that_come_out_wrong_do_not_start(
    backbone: Path, options: PluginOptions, tmp_path: Path
) -> None:
    break_blends(tmp_path)
    said = why_it_ended(backbone, options, tmp_path)
    assert "differ by 0.01 from plain products" in said


def asked_and_expected(
    server: VllmServer, model: Any, modules: dict[str, Module]
) -> tuple[list[list[int]], list[list[int]]]:
    """Blends and the backbone, all at once."""
    blends = [
        Blend(),
        Blend({"m0": 0.5, "m2": -1.0}),
        Blend({"m1": 1.0}),
        Blend(),
        Blend({"m0": 0.25, "m1": 0.25, "m2": 0.25}),
    ]
    asked = [(blend, make_prompt(6 + k, seed=k)) for k, blend in enumerate(blends)]

    def tokens(blend: Blend, prompt: tuple[int, ...]) -> list[int]:
        digests = {name: modules[name].digest for name in blend}
        name = lora_name(blend.renamed(digests)) if blend else BASE
        return server.tokens(name, prompt, 12)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(tokens, *zip(*asked, strict=True)))
    return found, [reference_tokens(model, modules, blend, p, 12) for blend, p in asked]


def test_auto_is_virtual_where_blends_come_out_right(
    backbone: Path, options: PluginOptions, model: Any, modules: dict[str, Module], tmp_path: Path
) -> None:
    with running(backbone, replace(options, mode="auto"), tmp_path / "vllm.log") as server:
        found, expected = asked_and_expected(server, model, modules)
        assert found == expected
        assert "blend:" not in server.get("/v1/models")[1]  # as vLLM's own LoRAs would be


def test_auto_materialises_where_they_do_not(
    backbone: Path,
    shapes: Shapes,
    model: Any,
    modules: dict[str, Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_blends(tmp_path)
    variables = {**environment(PluginOptions(tmp_path)), "PYTHONPATH": str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    servers = VllmOptions(
        mode="auto",
        slots=SLOTS,
        rank=RANK,
        flags={"max_num_batched_tokens": 512},
        start_s=280,
        log_folder=tmp_path,
    )
    limits = EngineOptions(max_concurrency=4, max_length=128)
    engine = VllmEngine(backbone, shapes, servers, dtype="float32", options=limits)
    digests = {name: engine.load_module(module) for name, module in modules.items()}
    told: list[str] = []
    engine.start(told.append)
    try:
        (again,) = (line for line in told if "started again, to materialise" in line)
        assert "differ by 0.01 from plain products" in again
        assert next(iter(engine.replicas)).restarts == 1
        blend, prompt = Blend({"m0": 0.5, "m2": -1.0}), make_prompt(9, seed=3)
        sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        request = GenerationRequest(prompt, blend=blend.renamed(digests), sampling=sampling)
        found = [event.token_id for event in engine.submit(request)]
        assert found == reference_tokens(model, modules, blend, prompt, 12)
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def materialising(
    backbone: Path, options: PluginOptions, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    flags = ("--lora-target-modules", *targets)
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with running(backbone, replace(options, mode="materialise"), log, *flags) as found:
        yield found


def test_materialised_blends_are_the_merged_models_too(
    materialising: VllmServer, model: Any, modules: dict[str, Module]
) -> None:
    found, expected = asked_and_expected(materialising, model, modules)
    assert found == expected
    missing = lora_name(Blend({"0" * 64: 1.0}))
    assert materialising.post("/v1/completions", {"model": missing, "prompt": "a"})[0] == 404
