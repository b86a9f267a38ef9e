"""Scorers: functions of installed packages, and services."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.scorers import AT_ONCE, ScorerError, Scoring, check_scorer

from .lab import Lab, eventually, experiment, lab
from .recorded import shadow_pairs_of

PLUGIN = """
import time
def longer(asked, answer, other):
    return len(other) - len(answer) + (isinstance(asked, list) and len(asked))
def broken(asked, answer, other):
    raise KeyError("weights")
def wordy(asked, answer, other):
    return "good"
def endless(asked, answer, other):
    return float("nan")
def slow(asked, answer, other):
    time.sleep(0.6)
    return 1.0
"""
NAMES = ("longer", "broken", "wordy", "endless", "slow")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "scoring-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "scoring_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Name: scoring\nVersion: 1.0\n")
    points = "".join(f"{name} = scoring_plugin:{name}\n" for name in NAMES)
    (info / "entry_points.txt").write_text(f"[mergeroute.scorers]\n{points}")
    monkeypatch.syspath_prepend(str(info.parent))


class Handler(BaseHTTPRequestHandler):
    """Answers as its path says."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answers: dict[str, tuple[int, bytes]] = {
            "/good": (200, json.dumps({"score": len(asked["other_answer"])}).encode()),
            "/text": (200, b'{"score": "1"}'),
            "/nan": (200, b'{"score": NaN}'),
            "/huge": (200, b'{"score": 1' + b"0" * 400 + b"}"),
            "/list": (200, b"[1]"),
            "/long": (200, b" " * (1 << 20)),
            "/moved": (302, b""),
            "/broken": (500, b"no"),
        }
        status, content = answers[self.path]
        self.send_response(status)
        self.send_header("location", "/good")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def score(name: str, *, timeout_s: float = 5, asked: str = "why", other: str = "because") -> float:
    return asyncio.run(Scoring(timeout_s).score(name, asked, "so", other))


@pytest.mark.usefixtures("installed")
def test_a_function_scores() -> None:
    check_scorer("longer")
    assert score("longer") == 5


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "KeyError: 'weights'"),
        ("wordy", "could not convert"),
        ("endless", "must be finite"),
        ("gone", "is not installed"),
    ],
)
def test_a_function_that_fails_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        score(name)


@pytest.mark.usefixtures("installed")
def test_slow_ones_are_left_behind_and_do_not_pile_up() -> None:
    async def many() -> list[BaseException | float]:
        scoring = Scoring(0.05)
        asked = [scoring.score("slow", "", "", "") for _ in range(AT_ONCE + 1)]
        return await asyncio.gather(*asked, return_exceptions=True)

    began = time.monotonic()
    told = sorted(map(str, asyncio.run(many())))
    assert time.monotonic() - began < 0.6
    assert told == ["4 scorers have not ended yet"] + ["no score within 0.05 s"] * AT_ONCE


def test_a_service_scores(service: str) -> None:
    check_scorer(f"{service}/good")
    assert score(f"{service}/good") == 7


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/text", "is not"),
        ("/nan", "must be finite"),
        ("/huge", "must be finite"),
        ("/list", "is not"),
        ("/long", "too long"),
        ("/moved", "answered 302"),
        ("/broken", "answered 500"),
    ],
)
def test_a_service_that_fails_is_an_error(service: str, path: str, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        score(service + path)


def test_a_service_is_not_sent_too_much(service: str) -> None:
    with pytest.raises(ScorerError, match=r"over 1,048,576"):
        score(f"{service}/good", other="x" * (1 << 20))


def test_a_service_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ScorerError, match="ConnectError"):
        score("http://127.0.0.1:9/score")


@pytest.mark.parametrize("name", ["nothing", "http://", "https://me:word@host/", "file:///etc"])
def test_what_is_no_scorer_is_refused(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_scorer(name)
    assert (caught.value.param, caught.value.code) == ("shadow.scorer", "scorer_not_found")


def is_paired(served: Lab, name: str) -> bool:
    return len(shadow_pairs_of(served.live.store, name)) == 2


@pytest.mark.usefixtures("installed")
def test_pairs_are_scored_and_errors_are_told(bank: Bank, service: str, tmp_path: Path) -> None:
    """Of one bank, so that both answers are the same."""
    variants = [
        {"name": "old", "target": "zoo", "weight": 0.9999, "control": True},
        {"name": "new", "target": "zoo", "weight": 0.0001},
    ]
    scorers = {"good": "longer", "bad": "broken", "far": f"{service}/good"}
    with lab([bank], tmp_path / "state") as served:
        refused = {"variant": "new", "share": 1, "scorer": "nothing"}
        body = experiment(variants=variants, shadow=refused)
        response = served.call("POST", "/v1/experiments", body)
        assert response.json()["error"]["code"] == "scorer_not_found"
        for name, scorer in scorers.items():
            shadow = {"variant": "new", "share": 1, "scorer": scorer}
            served.begin(name=name, variants=variants, shadow=shadow, layer=name)
            for number in range(2):
                assert served.chat(name, f"u{number}").status_code == 200
                assert eventually(lambda: not served.service._shadows._tasks)
        told = {}
        for name in scorers:
            assert eventually(partial(is_paired, served, name))
            results = served.call("GET", f"/v1/experiments/{name}/results").json()
            [told[name]] = results["shadow"]
    assert told["good"]["score"]["mean"] == 1  # one message, answers of one length
    assert (told["good"]["score"]["pairs"], told["good"]["scorer_errors"]) == (2, 0)
    assert (told["bad"]["score"], told["bad"]["scorer_errors"]) == (None, 2)
    assert told["far"]["score"]["pairs"] == 2
