"""Loads and unloads that outlive the server."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank, write_bank
from mergeroute.serving.errors import ApiError, SettingsError
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.state import STATE_FILE, BankState, ModuleChange, State, StateFolder
from mergeroute.serving.service import Service, ServiceOptions
from mergeroute.serving.settings import ServeSettings

from ..conftest import running
from ..process import serving
from .test_changes import DIGIT, SAMPLES, SING, UPPER, Hot, expected, text_of, write_module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    for number, name in enumerate(("sing", "sing2"), 70):
        write_module(folder, name, number)
    return folder


@contextmanager
def served_with(bank: Bank, root: Path, state: Path) -> Iterator[Hot]:
    service = Service(
        host_banks([bank], Placement(dtype="float32")),
        ServiceOptions(module_roots=(root,)),
        StateFolder(state),
    )
    with running(service) as url:
        yield Hot(url, service, root)


def listed(url: str) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in httpx.get(url + "/v1/modules").json()["data"]}


def test_complaint_14_modules_come_back_after_a_restart(
    bank: Bank, root: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with served_with(bank, root, state) as hot:
        hot.load("sing", "sing", samples=SAMPLES, description="Songs")
        hot.load("sing", "sing", load_inplace=True)
        hot.load("upper", "sing2", load_inplace=True, pinned=True)
        hot.load("gone", "sing2")
        assert hot.unload("digit").status_code == 200
        assert hot.unload("gone").status_code == 200
        before = {name: describe(entry) for name, entry in listed(hot.url).items()}
        routed = [hot.route(text) for text in (SING, UPPER, DIGIT)]
    with served_with(bank, root, state) as hot:
        after = listed(hot.url)
        assert {name: describe(entry) for name, entry in after.items()} == before
        assert set(after) == {"sing", "upper"}
        assert (after["sing"]["generation"], after["sing"]["samples"]) == (2, 10)
        assert (after["upper"]["generation"], after["upper"]["pinned"]) == (2, True)
        for text, decision in zip((SING, UPPER, DIGIT), routed, strict=True):
            assert hot.route(text)["blend"] == decision["blend"]
        assert hot.route(SING)["blend"] == {"sing": 1.0}
        assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 70)
        assert text_of(hot.chat(SING, model="upper")) == expected(bank, SING, 71)
        assert hot.chat(SING, model="digit").status_code == 404
        again = hot.load("gone", "sing2")
        assert again.headers["x-mergeroute-generation"] == "2"


def describe(entry: dict[str, Any]) -> dict[str, Any]:
    kept = ("digest", "generation", "description", "samples", "pinned", "path", "state", "rank")
    return {key: entry[key] for key in kept}


def test_a_module_whose_files_went_or_changed_is_reported_and_not_fatal(
    bank: Bank, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    shutil.copytree(root / "sing", root / "gone")
    shutil.copytree(root / "sing", root / "other")
    with served_with(bank, root, state) as hot:
        hot.load("sing", "sing")
        hot.load("gone", "gone")
        hot.load("upper", "other", load_inplace=True)
    (root / "gone").rename(root / "away")
    shutil.copytree(root / "sing2", root / "other", dirs_exist_ok=True)
    with served_with(bank, root, state) as hot:
        found = listed(hot.url)
        assert found["sing"]["state"] == "resident"
        assert found["gone"]["state"] == found["upper"]["state"] == "failed"
        assert "No adapter found" in found["gone"]["error"]
        assert "have changed since they were loaded" in found["upper"]["error"]
        assert "zoo:gone could not be brought back" in caplog.text
        assert hot.chat(SING, model="upper").status_code == 404  # not what was replaced
        assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 70)
        assert hot.unload("upper").status_code == 200
        assert hot.unload("upper").status_code == 404
    (root / "away").rename(root / "gone")
    with served_with(bank, root, state) as hot:
        found = listed(hot.url)
        assert found["gone"]["state"] == "resident"
        assert set(found) == {"sing", "gone", "digit"}


def test_a_bank_built_anew_keeps_its_loads_and_its_own_modules_go_first(
    bank: Bank, root: Path, tmp_path: Path, checkpoint: Backbone
) -> None:
    state = tmp_path / "state"
    with served_with(bank, root, state) as hot:
        hot.load("sing", "sing")
        hot.load("upper", "sing2", load_inplace=True)
    write_module(tmp_path, "upper", 99)
    upper, digit = bank.modules
    anew = write_bank(
        tmp_path / "anew",
        name=bank.name,
        backbone=checkpoint,
        modules=[type(upper)("upper", tmp_path / "upper"), digit],
    )
    with served_with(anew, root, state) as hot:
        assert set(listed(hot.url)) == {"upper", "digit", "sing"}
        assert text_of(hot.chat(SING, model="upper")) == expected(bank, SING, 99)
        assert listed(hot.url)["upper"]["generation"] == 3


def test_a_load_that_cannot_be_kept_is_not_made(bank: Bank, root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with served_with(bank, root, state) as hot:
        assert hot.load("sing", "sing").status_code == 200
        before, kept = listed(hot.url), (state / STATE_FILE).read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            refused = hot.load("new", "sing2"), hot.unload("sing")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for response in refused:
            assert (response.status_code, response.json()["error"]["code"]) == (
                507,
                "state_not_written",
            )
        assert listed(hot.url) == before
        assert hot.resident == 3
        assert (state / STATE_FILE).read_bytes() == kept
        assert {file.name for file in state.iterdir()} == {STATE_FILE, "lock"}
        assert hot.load("new", "sing2").status_code == 200


def test_killed_during_loads_it_comes_back_before_or_after_one(
    bank: Bank, root: Path, tmp_path: Path, checkpoint: Backbone
) -> None:
    folder, state = tmp_path / "plain", tmp_path / "state"
    plain = write_bank(folder, name="zoo", backbone=checkpoint, modules=bank.modules)
    done: list[str] = []

    def load_many(url: str) -> None:
        for number in range(10_000):
            body = {"lora_name": f"m{number}", "lora_path": "sing"}
            try:
                if httpx.post(url + "/v1/load_lora_adapter", json=body).status_code == 200:
                    done.append(f"m{number}")
            except httpx.HTTPError:
                return

    server = serving("serve", folder, "--dtype", "float32", "--module-root", root, "--state", state)
    with server as url:
        with pytest.raises(SettingsError, match="another server keeps its state in"):
            StateFolder(state)
        loading = threading.Thread(target=load_many, args=(url,))
        loading.start()
        while len(done) < 7:
            assert loading.is_alive()
        server.process.send_signal(signal.SIGKILL)
        loading.join()
    with served_with(plain, root, state) as hot:
        found = {name for name, entry in listed(hot.url).items() if entry["state"] == "resident"}
        expected_now = {"upper", "digit", *done}
        assert expected_now <= found
        assert len(found - expected_now) <= 1


def test_a_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b'{"format": 2}', b'{"more": 1}', b"\xff"):
        (tmp_path / STATE_FILE).write_bytes(content)
        folder = StateFolder(tmp_path)
        with pytest.raises(SettingsError, match=r"modules\.json cannot be read: put back a copy"):
            folder.read()
        folder.close()


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "deep" / "state")
    assert folder.read() == State()
    (tmp_path / "deep" / "state" / f"{STATE_FILE}.new").write_text("half a sta")
    change = ModuleChange(name="a", digest="sha256:1", path="/x", samples=("é\n",), pinned=True)
    empty = BankState(name="zoo", backbone="sha256:0")
    bank = State().model_copy(
        update={"banks": (empty.changed(change, generation=3),)},
    )
    folder.write(bank)
    assert folder.read() == bank
    assert json.loads((folder.folder / STATE_FILE).read_text())["format"] == 1
    folder.close()
    with pytest.raises(ApiError, match="the server stops"):
        folder.write(bank)


def test_where_the_state_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = ServeSettings(banks=("b",)).state_folder(8000)
    assert folder is not None
    assert folder.folder == tmp_path / "mergeroute" / "8000"
    folder.close()
    assert ServeSettings(banks=("b",), port=0).state_folder(4567) is None
    assert ServeSettings(banks=("b",), state="none").state_folder(8000) is None
    named = ServeSettings(banks=("b",), port=0, state=str(tmp_path / "s")).state_folder(4567)
    assert named is not None
    assert named.folder == tmp_path / "s"
    named.close()
    uploading = ServeSettings.model_validate(
        {"banks": ["b"], "state": "none", "module_sources": {"uploads": True}}
    )
    with pytest.raises(SettingsError, match="uploads are kept in the state folder"):
        uploading.state_folder(8000)
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be used"):
        ServeSettings(banks=("b",), state=str(tmp_path / "file")).state_folder(8000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert ServeSettings(banks=("b",)).state_folder(8000) is None
