"""Modules from the hub's cache, and those that clients send."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import httpx
import pytest
from huggingface_hub import constants

from mergeroute.adapters.bank import Bank
from mergeroute.serving.access.limits import Limits
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.modules.state import StateFolder
from mergeroute.serving.service import Service, ServiceOptions

from ..conftest import running
from .test_changes import SING, Hot, expected, text_of, write_module

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def open_server(bank: Bank, tmp_path: Path) -> Iterator[Callable[[], Hot]]:
    """A server that takes modules from everywhere; called again, it is started again."""
    write_module(tmp_path, "sing", 70)
    (tmp_path / "roots").mkdir()
    started: list[running] = []

    def start() -> Hot:
        while started:
            started.pop().__exit__()
        options = ServiceOptions(
            module_roots=(tmp_path / "roots",),
            limits=Limits(module_bytes=200_000),
            hub=True,
            uploads=True,
        )
        hosted = host_banks([bank], Placement(dtype="float32"))
        service = Service(hosted, options, StateFolder(tmp_path / "state"))
        started.append(running(service))
        return Hot(started[0].__enter__(), service, tmp_path)

    yield start
    while started:
        started.pop().__exit__()


def send(hot: Hot, content: bytes) -> httpx.Response:
    return httpx.post(hot.url + "/v1/modules/upload", content=content, timeout=60)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w", **header: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in header.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_uploaded_module_answers_and_comes_back_after_a_restart(
    open_server: Callable[[], Hot], bank: Bank
) -> None:
    hot = open_server()
    files = files_of(hot.root / "sing")
    form = {"file": ("sing.tar", tarred(files))}
    sent = [
        send(hot, zipped(files)),
        send(hot, tarred(files)),
        send(hot, tarred(files_of(hot.root / "sing", "sing/"))),
        httpx.post(hot.url + "/v1/modules/upload", files=form, data={"note": "x"}, timeout=60),
    ]
    places = {response.json()["lora_path"] for response in sent}
    assert len(places) == 1, [response.text for response in sent]
    path = places.pop()
    assert hot.load("sing", path).status_code == 200
    assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 70)
    write_module(hot.root, "unused", 75)
    assert send(hot, zipped(files_of(hot.root / "unused"))).status_code == 200
    uploads = hot.root / "state" / "uploads"
    assert len(list(uploads.iterdir())) == 2
    hot = open_server()
    assert [place.name for place in uploads.iterdir()] == [path]
    assert text_of(hot.chat(SING, model="sing")) == expected(bank, SING, 70)


def test_complaint_17_a_bad_upload_leaves_nothing_behind(open_server: Callable[[], Hot]) -> None:
    hot = open_server()
    good = files_of(hot.root / "sing")
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    links = tarred(good, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    nested = tarred({"x": b""}, type=tarfile.XHDTYPE)[:512] * 2000
    folders = tarred({f"d{n}": b"" for n in range(100)}, type=tarfile.DIRTYPE)
    cut = {**good, weights: good[weights][:-100]}
    bad = {
        "neither a zip file": [b"", b"x" * 5000, b"\x80\x04pickle", tarred(good, "w:gz")],
        "no regular file": [links, tarred(good, type=tarfile.LNKTYPE, linkname=config)],
        "archive is damaged": [
            tarred(good)[:1500],
            zipped(good)[:40] + zipped(good)[60:],
            nested,
        ],
        "files and folders": [folders],
        "'../adapter_config.json'": [
            zipped({"../" + config: b"{}"}),
            tarred({"../" + config: b""}),
        ],
        "/adapter_config.json": [tarred({"/tmp/" + config: b"{}"}), zipped({"a/b/" + config: b""})],
        "adapter_model.bin": [zipped({**good, "adapter_model.bin": b"x"})],
        "several folders": [zipped({"a/" + config: good[config], "b/" + weights: good[weights]})],
        "holds no adapter_config": [zipped({}), tarred({weights: good[weights]})],
        "its header says": [zipped(cut)],
        "limits.module_bytes": [zipped({config: b" " * 300_000})],
    }
    for words, archives in bad.items():
        for archive in archives:
            response = send(hot, archive)
            assert response.status_code == 400, (words, response.text)
            assert words in response.text
            assert "state" not in response.json()["error"]["message"]
    assert send(hot, b"x" * 2_000_000).status_code == 413
    for content in ({"files": {"a": b"", "b": b""}}, {"data": {"a": "b"}, "files": {"": b""}}):
        response = httpx.post(hot.url + "/v1/modules/upload", **content)
        assert response.status_code == 400, response.text
    assert list((hot.root / "state" / "uploads").iterdir()) == []


def test_damaged_archives_are_told_from_a_full_disk(open_server: Callable[[], Hot]) -> None:
    hot = open_server()
    good = files_of(hot.root / "sing")
    random = Random(0)
    with httpx.Client(timeout=60) as client:
        for whole in (zipped(good), tarred(good)):
            for _ in range(40):
                content = bytearray(whole)
                for _ in range(random.randint(1, 4)):
                    at = random.choice((random.randrange(600), -random.randrange(1, 400)))
                    content[at] = random.randrange(256)
                cut = bytes(
                    content[: random.choice((len(content), random.randrange(len(content))))]
                )
                response = client.post(hot.url + "/v1/modules/upload", content=cut)
                assert response.status_code in (200, 400), response.text


def test_uploads_and_the_hub_are_off_unless_asked_for(bank: Bank, tmp_path: Path) -> None:
    service = Service(
        host_banks([bank], Placement(dtype="float32")), ServiceOptions(module_roots=(tmp_path,))
    )
    with running(service) as url:
        hot = Hot(url, service, tmp_path)
        response = send(hot, b"")
        assert (response.status_code, response.json()["error"]["code"]) == (403, "uploads_disabled")
        assert hot.load("sing", "org/sing").status_code == 404


def test_complaint_13_a_hub_id_is_loaded_from_the_cache_when_offline(
    open_server: Callable[[], Hot], bank: Bank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hot = open_server()
    unreached = hot.load("sing", "org/sing")
    assert (unreached.status_code, unreached.json()["error"]["code"]) == (400, "hub_unreachable")
    repository = cache / "models--org--sing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, file in enumerate((tmp_path / "sing").iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for number, asked in enumerate(("org/sing", f"org/sing@{COMMIT}", "org/sing@main")):
        response = hot.load(f"sing{number}", asked)
        assert response.status_code == 200, response.text
    assert text_of(hot.chat(SING, model="sing1")) == expected(bank, SING, 70)
    for asked in ("org/other", "org/sing@gone", "../sing", "org/..", "org/sing@../../x"):
        assert hot.load("new", asked).status_code in (400, 404), asked
    (snapshot / "adapter_vectors.safetensors").symlink_to("/etc/passwd")
    assert "leads out" in hot.load("new", "org/sing").json()["error"]["message"]
    (snapshot / "adapter_vectors.safetensors").unlink()
    hot = open_server()
    assert text_of(hot.chat(SING, model="sing0")) == expected(bank, SING, 70)
