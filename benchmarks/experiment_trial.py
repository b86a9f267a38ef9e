"""An experiment from its file to promotion and rollback: a static merge against the routed bank, on
a server that is killed under its users.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mergeroute.adapters.build import build
from mergeroute.adapters.recipe_file import read_recipe
from mergeroute.routers.data import Example

from .experiment_users import METRIC, Crowd, Ledger, Lost, Serving, World, live, lost

ROOT = Path(__file__).parent.parent
ROUTED = ROOT / "serving" / "demo_bank"
STATIC_RECIPE = ROOT / "examples" / "recipes" / "static.yaml"
EXPERIMENT = ROOT / "examples" / "experiment.yaml"
NAME = "zoo-trial"
SALT = "salt: crowd\n"  # the same users get the same variants in every run
DATA = ROOT / "examples" / "zoo" / "test.jsonl"


@dataclass(frozen=True)
class Trial:
    """What came of it. right: share of right answers, as the users' examples say. winner: as the
    report says. answering: digest of the bank that answers `auto`, at each stage. restless: users
    who met two variants.
    """

    winner: str | None
    reason: str
    right: dict[str, float]
    metric: dict[str, Any]
    sample_ratio: dict[str, Any]
    answers: int
    scores: int
    interrupted: int
    kills: int
    lost: Lost
    restless: int
    answering: dict[str, str] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Killer:
    """Counts requests; at each of some counts the server is killed and started again."""

    def __init__(self, server: Serving, at: Sequence[int], step: Callable[[], None]) -> None:
        self._server, self._at, self._step = server, list(at), step
        self._count, self._lock = 0, threading.Lock()
        self.kills = 0

    def __call__(self) -> None:
        """One more. Whoever makes the count waits until the server is back; others meet its end."""
        with self._lock:
            self._count += 1
            is_time = bool(self._at) and self._count >= self._at[0]
            if is_time:
                self._at.pop(0)
        self._step()
        if is_time:
            self._server.kill()
            self.kills += 1
            self._server.start()


def run_trial(
    folder: Path,
    crowd: Crowd,
    examples: Sequence[Example],
    *,
    kill_at: Sequence[int],
    page: Path,
    step: Callable[[], None] = lambda: None,
) -> Trial:
    """All of it. kill_at: counts of requests. page: where the report goes."""
    build(read_recipe(STATIC_RECIPE), folder / "static")
    file = folder / "experiment.yaml"
    file.write_text(EXPERIMENT.read_text("utf-8") + SALT, encoding="utf-8")
    state, ledger, answering = folder / "state", Ledger(), {}
    with Serving([folder / "static", ROUTED], state) as server:
        server.command("create", str(file))
        answering["before"] = bank_of_auto(server.url)
        server.command("start", NAME)
        killer = Killer(server, kill_at, step)
        live(server.url, "auto", World(crowd, examples, ledger, killer))
        missing = lost(state / "experiments.sqlite", ledger)
        results = json.loads(server.command("report", NAME, "--html", str(page), "--json"))
        winner = results["verdict"]["winner"]
        if winner:
            server.command("promote", NAME, winner)
            answering["promoted"] = bank_of_auto(server.url)
            server.command("rollback", NAME)
            answering["rolled back"] = bank_of_auto(server.url)
    return Trial(
        winner=winner,
        reason=results["verdict"]["reason"],
        right=ledger.shares,
        metric=next(metric for metric in results["metrics"] if metric["name"] == METRIC),
        sample_ratio=results["sample_ratio"],
        answers=len(ledger.delivered),
        scores=len(ledger.acknowledged),
        interrupted=ledger.interrupted,
        kills=killer.kills,
        lost=missing,
        restless=sum(len(met) > 1 for met in ledger.variants.values()),
        answering=answering,
    )


def bank_of_auto(url: str) -> str:
    """Whose digest answers, outside of experiments."""
    body = {"model": "auto", "prompt": "What is 14 in Roman numerals?", "max_tokens": 1}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
    response.raise_for_status()
    return response.headers["x-mergeroute-bank"]
