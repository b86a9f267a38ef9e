"""The page of a report: what it holds, that it needs nothing else, and that nothing breaks out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.errors import SettingsError
from mergeroute.serving.experiment_client import ServerError
from mergeroute.serving.experiment_plots import Effect, Point, effect_plot
from mergeroute.serving.experiment_report import check_page, read_results, render_page, write_page
from mergeroute.serving.experiments.answers import Bounds
from mergeroute.serving.experiments.records import Record

from .experiments.lab import Lab, lab
from .experiments.recorded import exposure, feedback, outcome, shadow_pair

HOSTILE = "<script>alert('x')</script>"
VARIANTS = [
    {"name": "old", "target": "zoo", "weight": 0.5, "control": True},
    {"name": "new", "target": "upper", "weight": 0.5},
]


class Page(HTMLParser):
    """Tags, what they refer to, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def served(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """With an experiment of which much is known."""
    with lab([bank], tmp_path_factory.mktemp("reports") / "state") as found:
        begun = found.begin(
            variants=VARIANTS, guardrails=[{"metric": "error", "max_increase": 0.1}]
        )
        assert found.call("POST", "/v1/experiments/trial/pause", {"reason": HOSTILE}).is_success
        found.live.store.insert(list(records(begun["version"])))
        yield found


def records(version: int) -> Iterator[Record]:
    """Of 300 users; the new variant is right more often."""
    for number in range(300):
        variant, name, at = ("old", "new")[number % 2], f"r{number}", 1e9 + 60 * number
        stated = {"experiment": "trial", "version": version, "variant": variant}
        yield exposure(name, unit=f"u{number}", at=at, **stated)
        yield outcome(name, at=at + 1, latency_ms=10.0 + number % 7)
        is_right = number % 10 < (4 if variant == "old" else 9)
        yield feedback(name, float(is_right), at=at + 2)
        if variant == "old" and number % 3 == 0:
            pair = shadow_pair(name, at=at + 3, variant="new", agrees=number % 4 == 0)
            yield replace(pair, experiment="trial")


def page_of(served: Lab, points: int = 20) -> str:
    results = served.call("GET", f"/v1/experiments/trial/results?points={points}").json()
    versions = served.call("GET", "/v1/experiments/trial/versions").json()
    return render_page(read_results(results), versions)


def test_it_says_what_is_known(served: Lab) -> None:
    page = Page(page_of(served))
    for words in ("Winner: new.", "score (up is better)", "significant", "guardrail holds"):
        assert words in page.words
    for words in ("latency_ms", "Shadow answers", "History", "started", "as the weights say"):
        assert words in page.words
    assert page.tags.count("figure") == page.tags.count("svg") > 0


def test_it_needs_nothing_from_elsewhere(served: Lab) -> None:
    text = page_of(served)
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "url(http" not in text
    assert "@import" not in text


def test_what_others_wrote_stays_text(served: Lab) -> None:
    text = page_of(served)
    assert HOSTILE not in text
    assert HOSTILE in Page(text).words


def test_without_points_there_is_no_picture(served: Lab) -> None:
    assert "svg" not in Page(page_of(served, points=0)).tags


def test_a_page_takes_the_place_of_another_at_once(served: Lab, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    results = read_results(served.call("GET", "/v1/experiments/trial/results").json())
    with pytest.raises(ServerError, match="not understood"):
        write_page(path, results, {"data": [{"name": 1}]})
    assert path.read_text() == "before"
    write_page(path, results, served.call("GET", "/v1/experiments/trial/versions").json())
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SettingsError, match="is a folder"):
        check_page(tmp_path)


def test_an_answer_of_another_kind_is_not_understood() -> None:
    with pytest.raises(ServerError, match="experiment: Field required"):
        read_results({"object": "experiment.results"})


def effect(change: float | None, reach: float | None = None) -> Effect:
    bounds = None
    if change is not None and reach is not None:
        bounds = Bounds(lower=change - reach, upper=change + reach)
    return Effect(absolute_change=change, always_valid_interval=bounds)


def test_names_in_a_picture_stay_text() -> None:
    name = "<b>$x^2$ & --> \" '"
    points = [Point(at=60.0 * n, metrics={"m": {name: effect(0.1, 1 / (n + 1))}}) for n in range(9)]
    svg = effect_plot(points, "m")
    assert svg is not None
    root = ElementTree.fromstring(svg)
    assert name in "".join(root.itertext())
    assert "<!--" not in svg


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(at=0, metrics={})],
        [Point(at=0, metrics={"m": {"a": effect(None)}})],
    ],
)
def test_of_nothing_there_is_no_picture(points: list[Point]) -> None:
    assert effect_plot(points, "m") is None


def test_one_point_without_an_interval_is_drawn() -> None:
    assert effect_plot([Point(at=0, metrics={"m": {"a": effect(0.5)}})], "m")
