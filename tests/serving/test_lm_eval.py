"""lm-eval, as it is installed, against a server: its scores are those of the merged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.runtime.merging import merge_into
from mergeroute.serving.cli import DEMO_BANK

from .process import serving

pytestmark = pytest.mark.compat

LM_EVAL = Path(sys.executable).parent / "lm_eval"
TEST_SET = Path(__file__).parents[2] / "examples" / "zoo" / "test.jsonl"
MODULE = "roman"
COUNT = 20
MOST_TOKENS = 48

COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "target_delimiter": "",
}
CHOOSING = {
    **COMMON,
    "task": "choosing",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}],
}
WRITING = {
    **COMMON,
    "task": "writing",
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": MOST_TOKENS},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("serve", DEMO_BANK, "--dtype", "float32") as address:
        yield address


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Prompts of one task, each with its answer and two others."""
    lines = [json.loads(line) for line in TEST_SET.read_text("utf-8").splitlines()]
    own = [line for line in lines if line["task"] == MODULE and line["wording"] == "known"][:COUNT]
    answers = [line["answer"] for line in own]
    made = []
    for place, line in enumerate(own):
        choices = [answers[(place + step) % len(own)] for step in range(3)]
        turn = place % 3
        told = {"choices": choices[turn:] + choices[:turn], "gold": -turn % 3}
        made.append({"prompt": line["prompt"], "answer": line["answer"], **told})
    return made


@dataclass(frozen=True)
class Merged:
    """The backbone that has the module merged in, as transformers runs it."""

    model: Any
    tokenizer: Any

    def prompt_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return ids

    @torch.no_grad()
    def likelihood(self, prompt: str, answer: str) -> tuple[float, bool]:
        """Log-probability of an answer, and whether it is what greedy decoding gives."""
        before, own = self.prompt_ids(prompt), self.tokenizer(answer)["input_ids"]
        logits = self.model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
        picked = logits.log_softmax(-1)[range(len(own)), own]
        return float(picked.sum()), logits.argmax(-1).tolist() == own

    @torch.no_grad()
    def answer(self, prompt: str) -> str:
        ids = torch.tensor([self.prompt_ids(prompt)])
        out = self.model.generate(
            ids,
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            attention_mask=torch.ones_like(ids),
        )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text.partition("\n")[0]


@pytest.fixture(scope="module")
def merged() -> Merged:
    bank = Bank.open(DEMO_BANK)
    path = bank.backbone.path
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    (entry,) = (module for module in bank.modules if module.name == MODULE)
    merge_into(model, {MODULE: bank.load(entry)}, Blend({MODULE: 1}))
    return Merged(model, transformers.AutoTokenizer.from_pretrained(path))


def evaluate(
    folder: Path, kind: str, address: str, task: dict[str, Any], documents: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the command reports of a task, and its samples in order."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    stated = {**task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "task.yaml").write_text(yaml.safe_dump(stated))
    backbone = Bank.open(DEMO_BANK, verify=False).backbone.path
    settings = f"{address},tokenizer={backbone},num_concurrent=4,max_retries=1,timeout=60"
    command = [LM_EVAL, "--model", kind, "--model_args", settings, "--include_path", folder]
    if kind == "local-completions":
        command += ["--batch_size", "4"]
    command += ["--tasks", task["task"], "--apply_chat_template", "--log_samples"]
    command += ["--output_path", folder / "out"]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **quiet}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    found: dict[str, Any] = json.loads(results.read_text())["results"][task["task"]]
    return found, sorted(lines, key=lambda line: int(line["doc_id"]))


def test_local_completions_score_choices_as_the_merged_model_does(
    url: str, tmp_path: Path, documents: list[dict[str, Any]], merged: Merged
) -> None:
    address = f"model={MODULE},base_url={url}/v1/completions,tokenizer_backend=huggingface"
    address += ",max_length=512"
    found, samples = evaluate(tmp_path, "local-completions", address, CHOOSING, documents)
    right = 0
    for document, sample in zip(documents, samples, strict=True):
        expected = [merged.likelihood(document["prompt"], each) for each in document["choices"]]
        told = [(float(value), str(greedy) == "True") for ((value, greedy),) in sample["resps"]]
        assert [value for value, _ in told] == pytest.approx([v for v, _ in expected], abs=2e-3)
        assert [greedy for _, greedy in told] == [greedy for _, greedy in expected]
        values = [value for value, _ in expected]
        right += values.index(max(values)) == document["gold"]
    assert found["acc,none"] == right / COUNT > 0.9


@pytest.mark.parametrize("model", [MODULE, "auto"])
def test_local_chat_completions_write_what_the_merged_model_writes(
    url: str, tmp_path: Path, documents: list[dict[str, Any]], merged: Merged, model: str
) -> None:
    address = f"model={model},base_url={url}/v1/chat/completions"
    found, samples = evaluate(tmp_path, "local-chat-completions", address, WRITING, documents)
    expected = [merged.answer(document["prompt"]) for document in documents]
    assert [sample["resps"][0][0] for sample in samples] == expected
    right = [text == document["answer"] for text, document in zip(expected, documents, strict=True)]
    assert found["exact_match,none"] == sum(right) / COUNT > 0.8
