"""Targets with two banks, engines that banks share, and banks that cannot be served together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, BankModule, write_bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.errors import BankError, ModuleError, UnknownTargetError
from mergeroute.routers.settings import FixedSettings
from mergeroute.routers.store import save_router
from mergeroute.serving.errors import ApiError
from mergeroute.serving.hosted import HostedBank
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.schemas.completions import ChatRequest
from mergeroute.serving.service import Service
from mergeroute.serving.targets import Targets

from ..tiny import make_model, make_module
from .conftest import write_checkpoint, write_routed_bank

PLACEMENT = Placement(dtype="float32")


@pytest.fixture(scope="module")
def hosted(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Backbone, bank: Bank
) -> Iterator[list[HostedBank]]:
    second = write_routed_bank(
        tmp_path_factory.mktemp("second") / "farm", name="farm", backbone=checkpoint, seed=50
    )
    hosted = host_banks([bank, second], PLACEMENT)
    yield hosted
    hosted[0].engine.stop()


def test_banks_on_one_backbone_share_its_engine(hosted: list[HostedBank]) -> None:
    assert hosted[0].engine is hosted[1].engine
    assert hosted[0].engine.stats().modules == 4
    assert hosted[0].digests.keys() == hosted[1].digests.keys()
    assert set(hosted[0].digests.values()).isdisjoint(hosted[1].digests.values())


def test_names_with_two_banks(hosted: list[HostedBank]) -> None:
    targets = Targets(hosted)
    assert targets.resolve("auto").hosted is hosted[0]
    assert targets.resolve("farm").hosted is hosted[1]
    assert targets.resolve("farm").blend is None
    pinned = targets.resolve("farm:upper")
    assert pinned.hosted is hosted[1]
    assert pinned.blend == Blend({"upper": 1.0})
    blended = targets.resolve("blend:farm:upper=0.5,farm:digit=0.25")
    assert blended.hosted is hosted[1]
    assert blended.blend == Blend({"upper": 0.5, "digit": 0.25})
    for ambiguous in ("blend:upper=0.5", "blend:zoo:upper=1,upper=1"):
        with pytest.raises(ApiError, match="zoo:upper or farm:upper"):
            targets.resolve(ambiguous)
    with pytest.raises(ApiError, match="zoo:upper or farm:upper"):
        targets.resolve("auto", {"upper": 1})
    assert targets.resolve("auto", {"farm:upper": 1}).hosted is hosted[1]
    assert targets.resolve("zoo", {"zoo:upper": 0.5}).blend == Blend({"upper": 0.5})
    with pytest.raises(ApiError, match="twice"):
        targets.resolve("zoo", {"zoo:upper": 0.5, "upper": 0.5})
    assert targets.describe("farm:upper")["parent"] == "tiny"
    assert targets.describe("blend:farm:upper=0.5")["max_model_len"] == 256
    assert targets.resolve("farm", {"digit": 1}).hosted is hosted[1]
    ids = [entry["id"] for entry in targets.listing()]
    assert ids == [
        "auto",
        "tiny",
        "zoo",
        "zoo:upper",
        "zoo:digit",
        "farm",
        "farm:upper",
        "farm:digit",
    ]


@pytest.mark.parametrize("name", ["upper", "nobody", "zoo:", ":upper", "farm:nobody", ""])
def test_an_ambiguous_or_unknown_name_is_refused(hosted: list[HostedBank], name: str) -> None:
    with pytest.raises(UnknownTargetError) as caught:
        Targets(hosted).resolve(name)
    if name == "upper":
        assert "zoo:upper or farm:upper" in str(caught.value)


def test_a_blend_over_two_banks_is_refused(hosted: list[HostedBank]) -> None:
    with pytest.raises(ApiError, match="one bank at a time"):
        Targets(hosted).resolve("blend:zoo:upper=1,farm:digit=1")


def test_a_bank_without_a_router_answers_from_the_backbone(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    make_module(make_model(), "m").save(tmp_path / "m")
    adhoc = Bank.adhoc("mine", checkpoint, [BankModule("m", tmp_path / "m")])
    service = Service(host_banks([adhoc], PLACEMENT))
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]})
    (assignment,) = asyncio.run(service.assign(body))
    service.stop()
    assert assignment.decision.blend == Blend()
    assert assignment.decision.router == "none"
    assert assignment.hosted.fingerprint.endswith("-none")


def test_a_router_that_names_an_absent_module_is_refused_and_nothing_stays(
    checkpoint: Backbone, tmp_path: Path
) -> None:
    make_module(make_model(), "m").save(tmp_path / "m")
    bank = write_bank(
        tmp_path / "bank",
        name="odd",
        backbone=checkpoint,
        modules=[BankModule("m", tmp_path / "m")],
        write_router=lambda folder: save_router(folder, FixedSettings(blend="gone=1")),
    )
    with pytest.raises(BankError, match="'gone', which the bank lacks"):
        host_banks([bank], PLACEMENT)


def test_a_module_of_another_base_is_refused(checkpoint: Backbone, tmp_path: Path) -> None:
    make_module(make_model("gpt2"), "m").save(tmp_path / "m")
    adhoc = Bank.adhoc("mine", checkpoint, [BankModule("m", tmp_path / "m")])
    with pytest.raises(ModuleError, match="no layer of the backbone"):
        host_banks([adhoc], PLACEMENT)


def test_one_name_for_two_things_is_refused(
    hosted: list[HostedBank], checkpoint: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(BankError, match="two banks are called 'zoo'"):
        Targets([hosted[0], hosted[0]])
    make_module(make_model(), "m").save(tmp_path / "m")
    clashing = Bank.adhoc("upper", checkpoint, [BankModule("m", tmp_path / "m")])
    (extra,) = host_banks([clashing], PLACEMENT)
    extra.engine.stop()
    with pytest.raises(BankError, match="'upper' would name two things"):
        Targets([hosted[0], extra])


def test_two_backbones_of_one_name_are_refused(hosted: list[HostedBank], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "tiny", seed=9)
    (extra,) = host_banks([Bank.adhoc("other", other, [])], PLACEMENT)
    extra.engine.stop()
    with pytest.raises(BankError, match="both called 'tiny'"):
        Targets([*hosted, extra])
