"""A bank of merged experts in its compact form, on a real vLLM: any model of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.smoe.build import MoeTools, build_moe
from mergeroute.adapters.smoe.recipe import MoeRecipe
from mergeroute.runtime.options import EngineOptions
from mergeroute.runtime.vllm.launch import Mode
from mergeroute.runtime.vllm.options import VllmOptions
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service

from ...moe import make_moe, save_moe, usage_of
from ...serving.conftest import running
from ...tiny import make_module, make_prompt, reference_tokens

pytestmark = pytest.mark.vllm
COMPACT = {"method": "m-smoe", "keep": 2, "router": "compact"}
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}  # vLLM's attention on CPUs


def compact_bank(family: str, folder: Path) -> Bank:
    """Of four experts merged into two."""
    original = make_moe(family, **SIZES)
    save_moe(original, folder / "moe")
    recipe = MoeRecipe.model_validate(
        {"base": str(folder / "moe"), "experts": COMPACT, "calibration": "prompts"}
    )
    tools = MoeTools(collect=lambda _: usage_of(original))
    return build_moe(recipe, folder / "merged", tools=tools)


@pytest.mark.parametrize(
    ("family", "mode"),
    [("mixtral", "virtual"), ("qwen3_moe", "virtual"), ("mixtral", "materialise")],
)
def test_a_compact_bank_and_its_modules_answer_as_transformers_does(
    family: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = compact_bank(family, tmp_path).backbone
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone.path, dtype=torch.float32)
    module = make_module(model, "attending", scale=0.15)
    module.save(tmp_path / "attending")
    entry = BankModule("attending", tmp_path / "attending")
    bank = write_bank(tmp_path / "bank", name="sparse", backbone=backbone, modules=[entry])
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    placement = Placement(
        dtype="float32",
        options=EngineOptions(max_concurrency=4, max_length=128),
        servers=VllmOptions(flags={"max_num_batched_tokens": 512}, start_s=280, mode=mode),
    )
    prompt = make_prompt(12, seed=4)
    answers = {"backbone": Blend({}), "sparse:attending": Blend({"attending": 1.0})}
    with running(Service(host_banks([bank], placement))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        for target, blend in answers.items():
            answer = client.completions.create(
                model=backbone.name if not blend else target,
                prompt=list(prompt),
                max_tokens=12,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            tokens: Any = answer.choices[0].model_extra
            expected = reference_tokens(model, {"attending": module}, blend, prompt, 12)
            assert tokens["token_ids"] == expected, target
