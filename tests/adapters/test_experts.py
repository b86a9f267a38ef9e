"""Bases and experts as they lie on disk, and what does not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.build import open_sources
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import BackboneError, CheckpointError, ModuleError, RecipeError
from mergeroute.adapters.experts import (
    Base,
    FullExpert,
    LoraExpert,
    open_expert,
    source_digest,
)
from mergeroute.adapters.kinds import Kind
from mergeroute.adapters.lora import Module

from ..experts import Zoo, changed, make_zoo, write_model
from ..tiny import make_model, make_module, make_rich_module

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj"
MIXED = ["llama", "gpt2", "gemma2", "qwen2"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"), make_model())


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("tied"), make_model(tied=True))


@pytest.fixture
def expert(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of expert a, to be damaged."""
    shutil.copytree(zoo.folder / "a", tmp_path / "a")
    return tmp_path / "a"


def edit(folder: Path, change: Any) -> None:
    """Change a checkpoint's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **values}))


def refuse(zoo: Zoo, path: Path, kind: type[Exception], *texts: str) -> None:
    with pytest.raises(kind) as caught:
        open_expert("x", path, Base.open(zoo.folder / "base"))
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("architecture", MIXED)
def test_deltas_are_expert_minus_base(architecture: str, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path, make_model(architecture))
    base = Base.open(tmp_path / "base")
    assert base.blocks == 3
    assert base.parameters.keys() == zoo.base.keys()
    for name in "abcd":
        opened = open_expert(name, tmp_path / name, base)
        assert isinstance(opened, FullExpert if name in "ab" else LoraExpert)
        for parameter, before in zoo.base.items():
            wanted = (zoo.experts[name][parameter] - before).reshape(-1, before.shape[-1])
            rows = before.reshape(-1, before.shape[-1])
            half = len(rows) // 2
            parts = [
                opened.delta_rows(parameter, 0, half, rows[:half]),
                opened.delta_rows(parameter, half, len(rows), rows[half:]),
            ]
            torch.testing.assert_close(torch.cat(parts), wanted, atol=1e-5, rtol=1e-4)
            assert opened.changes(parameter) or not wanted.any()


def test_a_lora_knows_its_factors_and_nothing_else(zoo: Zoo) -> None:
    base = Base.open(zoo.folder / "base")
    opened = open_expert("c", zoo.folder / "c", base)
    assert isinstance(opened, LoraExpert)
    changes = {p.layer for n, p in base.parameters.items() if opened.changes(n)}
    assert changes == set(opened.module.deltas)
    assert not opened.changes("model.norm.weight")


def test_a_rich_module_is_an_expert_with_its_embeddings_and_vectors(tmp_path: Path) -> None:
    model = make_model("qwen2", tied=True)
    write_model(tmp_path / "base", model)
    module = make_rich_module(model, "m")
    module.save(tmp_path / "m")
    base = Base.open(tmp_path / "base")
    opened = open_expert("m", tmp_path / "m", base)
    for name, vector in module.vectors.items():
        assert opened.changes(name)
        rows = base.checkpoint.read_rows(name, 0, 1)
        assert torch.equal(opened.delta_rows(name, 0, 1, rows)[0], vector)
    embedding = "model.embed_tokens.weight"
    rows = base.checkpoint.read_rows(embedding, 0, 300)
    wanted = module.deltas["model.embed_tokens"].dense()
    torch.testing.assert_close(opened.delta_rows(embedding, 0, 300, rows), wanted)


# What does not belong to the base.


def test_another_architecture_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    write_model(tmp_path / "x", make_model("qwen2"))
    refuse(zoo, tmp_path / "x", BackboneError, "'x'", "model_type 'qwen2'", "'llama'", "one base")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 301),
        ("hidden_size", 64),
        ("num_hidden_layers", 2),
        ("intermediate_size", 52),
        ("num_key_value_heads", 4),
    ],
)
def test_other_sizes_are_refused(key: str, value: int, zoo: Zoo, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {key: value}
    write_model(tmp_path / "x", make_model("llama", **sizes))
    refuse(zoo, tmp_path / "x", BackboneError, "'x'", f"{key} {value}", "one base")


def test_as_many_numbers_in_other_heads_are_refused(zoo: Zoo, expert: Path) -> None:
    edit_config(expert, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    refuse(zoo, expert, BackboneError, "num_attention_heads 8", "4")


def test_gpt2_sizes_are_compared_under_their_own_names(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", make_model("gpt2"))
    write_model(tmp_path / "x", make_model("gpt2", n_head=8))
    refuse(zoo, tmp_path / "x", BackboneError, "num_attention_heads 8")


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "rms_norm_eps", 1e-3),
        ("llama", "rope_parameters", {"rope_theta": 5.0, "rope_type": "default"}),
        ("mistral", "sliding_window", 7),
        ("gemma2", "hidden_activation", "relu"),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "layer_norm_epsilon", 1e-3),
    ],
)
def test_weights_that_are_run_in_another_way_are_refused(
    architecture: str, key: str, value: object, tmp_path: Path
) -> None:
    zoo = make_zoo(tmp_path / "zoo", make_model(architecture))
    assert open_expert("a", zoo.folder / "a", Base.open(zoo.folder / "base")).name == "a"
    edit_config(zoo.folder / "a", **{key: value})
    refuse(zoo, zoo.folder / "a", BackboneError, f"{key} {value!r}", "state it alike")


def test_heads_of_another_size_are_refused(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", make_model("qwen3"))
    edit_config(zoo.folder / "a", head_dim=16)
    refuse(zoo, zoo.folder / "a", BackboneError, "head_dim 16", "8")


def test_what_an_absent_key_means_may_be_stated(zoo: Zoo, expert: Path) -> None:
    document = json.loads((expert / "config.json").read_text())
    del document["rope_parameters"], document["head_dim"]
    (expert / "config.json").write_text(json.dumps({**document, "rope_theta": 10000}))
    assert open_expert("x", expert, Base.open(zoo.folder / "base")).name == "x"


def test_other_tiedness_is_refused(zoo: Zoo, tied: Zoo) -> None:
    refuse(zoo, tied.folder / "a", BackboneError, "tie_word_embeddings True", "False")
    refuse(tied, zoo.folder / "a", BackboneError, "tie_word_embeddings False", "True")


def test_tensors_that_only_one_of_them_has_are_refused(zoo: Zoo, expert: Path) -> None:
    edit(expert, lambda tensors: tensors.update(more=torch.ones(2)))
    refuse(zoo, expert, CheckpointError, "'x'", "'more'", "which the base lacks")
    edit(expert, lambda t: (t.pop("more"), t.pop(f"{LAYER}.weight")))
    refuse(zoo, expert, CheckpointError, "'x'", f"lacks the tensor '{LAYER}.weight'")


def test_a_tensor_of_another_shape_is_refused(zoo: Zoo, expert: Path) -> None:
    edit(expert, lambda t: t.update({f"{LAYER}.weight": torch.ones(48, 31)}))
    refuse(zoo, expert, CheckpointError, f"{LAYER}.weight", "[48, 31]", "[48, 32]")


def test_a_missing_or_truncated_shard_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = changed(make_model(), seed=1)
    model.save_pretrained(tmp_path / "x", max_shard_size="60KB")
    shard = sorted((tmp_path / "x").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    refuse(zoo, tmp_path / "x", CheckpointError, shard.name, "truncated")
    shard.unlink()
    refuse(zoo, tmp_path / "x", CheckpointError, shard.name, "index")


def test_a_path_that_is_no_expert_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    refuse(zoo, tmp_path / "nowhere", BackboneError, "'x'", "nowhere", "PEFT LoRA folder")
    refuse(zoo, tmp_path, BackboneError, "'x'", "config.json")


def test_an_expert_that_equals_the_base_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = make_model().bfloat16().float()
    write_model(tmp_path / "base", model)
    write_model(tmp_path / "same", model.bfloat16())
    entries = [{"name": "same", "path": str(tmp_path / "same")}]
    recipe = zoo.recipe(base=str(tmp_path / "base"), experts=entries)
    with pytest.raises(RecipeError, match=r"expert 'same' equals the base: .* right folder"):
        open_sources(recipe)


def test_one_entry_makes_a_difference(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.folder / "base", tmp_path / "a")
    edit(tmp_path / "a", lambda t: t["model.norm.weight"].add_(torch.eye(32)[31]))
    entries = [{"name": "a", "path": str(tmp_path / "a")}]
    _, (opened,) = open_sources(zoo.recipe(experts=entries))
    assert opened.name == "a"


# LoRAs of another base.


def save_lora(folder: Path, deltas: dict[str, LowRank], **keys: Any) -> Path:
    Module("x", deltas, **keys).save(folder)
    return folder


def low_rank(o: int, i: int, value: float = 1.0) -> LowRank:
    return LowRank(torch.full((o, 2), value), torch.full((2, i), value))


def test_a_lora_of_other_shapes_or_layers_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "x", {LAYER: low_rank(48, 64)})
    refuse(zoo, path, ModuleError, "'x'", LAYER, "48 x 64", "48 x 32", "another base")
    path = save_lora(tmp_path / "y", {"model.layers.7.mlp.up_proj": low_rank(48, 32)})
    refuse(zoo, path, ModuleError, "'x'", "model.layers.7.mlp.up_proj")


def test_a_lora_of_another_architecture_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    make_module(make_model("gpt2"), "x").save(tmp_path / "x")
    refuse(zoo, tmp_path / "x", ModuleError, "transformer.h", "no layer of the backbone")


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "NaN"), (float("inf"), "NaN"), (0.0, "changes nothing")]
)
def test_a_lora_of_nan_inf_or_zeros_is_refused(
    value: float, text: str, zoo: Zoo, tmp_path: Path
) -> None:
    path = save_lora(tmp_path / "x", {LAYER: low_rank(48, 32, value)})
    refuse(zoo, path, ModuleError, "'x'", text)


def test_a_truncated_lora_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "x", {LAYER: low_rank(48, 32)}) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(zoo, tmp_path / "x", ModuleError, "adapter_model.safetensors", "truncated")


def test_a_lora_that_unties_a_tied_head_is_refused(tied: Zoo, tmp_path: Path) -> None:
    embedding, head = {"model.embed_tokens": low_rank(300, 32)}, {"lm_head": low_rank(300, 32)}
    tables = frozenset(embedding)
    alone = save_lora(tmp_path / "e", embedding, embeddings=tables, ties_head=False)
    refuse(tied, alone, ModuleError, "'x'", "model.embed_tokens", "lm_head", "share one weight")
    refuse(tied, save_lora(tmp_path / "h", head), ModuleError, "share one weight")
    other = {"lm_head": low_rank(300, 32, 2.0)}
    both = save_lora(tmp_path / "b", embedding | other, embeddings=tables, ties_head=False)
    refuse(tied, both, ModuleError, "share one weight")
    base = Base.open(tied.folder / "base")
    for name, deltas, ties in (("t", embedding, True), ("s", embedding | head, False)):
        path = save_lora(tmp_path / name, deltas, embeddings=tables, ties_head=ties)
        assert open_expert("x", path, base).changes("model.embed_tokens.weight")


def test_a_lora_that_was_made_for_other_weights_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    base = Base.open(zoo.folder / "base")
    deltas = {LAYER: low_rank(48, 32)}
    stated = save_lora(tmp_path / "x", deltas, backbones=("sha256:0", base.weights_digest))
    assert open_expert("x", stated, base).name == "x"
    assert open_expert("x", save_lora(tmp_path / "y", deltas), base).name == "x"
    other = save_lora(tmp_path / "z", deltas, backbones=("sha256:0",))
    texts = ("'x'", "sha256:0", str(base.path), base.weights_digest)
    refuse(zoo, other, ModuleError, *texts)


def test_weights_are_read_for_their_digest_only_when_a_lora_states_one(zoo: Zoo) -> None:
    base = Base.open(zoo.folder / "base")
    open_expert("c", zoo.folder / "c", base)
    assert "files" not in vars(base)


def test_a_chat_template_does_not_make_other_weights(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.folder / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("changed")
    one, other = Base.open(zoo.folder / "base"), Base.open(tmp_path / "base")
    assert one.weights_digest == other.weights_digest
    assert source_digest(one) != source_digest(other)


def test_sources_are_known_by_their_files(zoo: Zoo, tmp_path: Path) -> None:
    base = Base.open(zoo.folder / "base")
    assert source_digest(base) == Backbone.open(zoo.folder / "base").digest
    for name in "ac":
        shutil.copytree(zoo.folder / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text("not part of it")
        digests = [source_digest(open_expert("x", f / name, base)) for f in (zoo.folder, tmp_path)]
        assert digests[0] == digests[1]
    make_module(make_model(), "c", seed=9).save(tmp_path / "c")
    assert source_digest(open_expert("x", tmp_path / "c", base)) != digests[0]


# Bases.


def test_a_base_that_lacks_a_tensor_is_refused(expert: Path) -> None:
    edit(expert, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(CheckpointError, match=rf"lacks the tensor '{LAYER}\.weight' \(1 in all\)"):
        Base.open(expert)


def test_a_base_that_stores_its_tensors_under_other_names_is_refused(expert: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(expert, strip)
    with pytest.raises(CheckpointError, match="other names; load it and save_pretrained"):
        Base.open(expert)


def test_a_quantised_base_is_refused(expert: Path) -> None:
    edit_config(expert, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BackboneError, match="is quantised: merge the bfloat16 checkpoint"):
        Base.open(expert)


def test_what_is_stored_beside_the_parameters_is_a_buffer(expert: Path) -> None:
    edit(expert, lambda tensors: tensors.update({"rotary.inv_freq": torch.ones(4)}))
    assert Base.open(expert).parameters["rotary.inv_freq"].kind is Kind.BUFFER


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias"])
def test_buffers_that_only_one_of_them_stores_do_not_matter(
    name: str, zoo: Zoo, expert: Path
) -> None:
    edit(expert, lambda tensors: tensors.update({name: torch.ones(4)}))
    opened = open_expert("x", expert, Base.open(zoo.folder / "base"))
    assert isinstance(opened, FullExpert)
    base = Base.open(expert)
    assert open_expert("x", zoo.folder / "b", base).name == "x"
    edit(expert, lambda tensors: tensors.update({name: torch.ones(7)}))
    assert open_expert("x", expert, base).name == "x"


def test_a_stored_copy_of_a_tied_head_is_no_parameter_of_its_own(tied: Zoo, tmp_path: Path) -> None:
    shutil.copytree(tied.folder / "base", tmp_path / "base")
    copy = "lm_head.weight"
    edit(tmp_path / "base", lambda t: t.update({copy: t["model.embed_tokens.weight"].clone()}))
    base = Base.open(tmp_path / "base")
    assert base.is_tied_copy(copy)
    assert copy not in base.parameters
    assert open_expert("a", tied.folder / "a", base).changes("model.embed_tokens.weight")
    plain = Base.open(tied.folder / "base")
    assert open_expert("x", tmp_path / "base", plain).name == "x"


def test_a_stored_head_that_is_tied_by_name_only_is_refused(tied: Zoo, tmp_path: Path) -> None:
    shutil.copytree(tied.folder / "a", tmp_path / "a")
    edit(tmp_path / "a", lambda t: t.update({"lm_head.weight": torch.ones(300, 32)}))
    refuse(tied, tmp_path / "a", CheckpointError, "expert 'x'", "lm_head.weight", "tie_word")
    with pytest.raises(CheckpointError, match=r"the base stores 'lm_head\.weight'"):
        Base.open(tmp_path / "a")
