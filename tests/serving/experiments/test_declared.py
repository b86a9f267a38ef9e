"""Experiments that a file declares, and what becomes of them at the next starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.serving.errors import SettingsError
from mergeroute.serving.experiments.declared import declare
from mergeroute.serving.experiments.definition import Experiment
from mergeroute.serving.settings import ServeSettings
from mergeroute.serving.settings_file import read_settings

from .lab import Lab, eventually, experiment, lab


@pytest.fixture(scope="module")
def served(bank: Bank, farm: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab([bank, farm], tmp_path_factory.mktemp("declared") / "state") as found:
        yield found


def say(served: Lab, **values: Any) -> list[tuple[str, str]]:
    """Declare an experiment in a layer of its own; the states and authors of its versions."""
    name = values["name"]
    document = Experiment.model_validate(experiment(layer=name, **values))
    declare(served.live, [document], served.service.targets)
    return [(stored.state, stored.changed_by) for stored in served.live.store.history(name)]


def test_it_is_made_and_started_once(served: Lab) -> None:
    file = "serve.yaml"
    begun = [("draft", file), ("running", file)]
    assert say(served, name="once", salt=None) == begun
    assert say(served, name="once", salt=None) == begun
    assert served.chat("once", "x").headers["x-mergeroute-experiment"] == "once"
    served.change("once", "pause")
    assert say(served, name="once", salt=None) == [*begun, ("paused", "anybody")]


def test_what_was_done_over_http_stays_until_the_file_changes(served: Lab) -> None:
    say(served, name="kept")
    etag = {"If-Match": served.call("GET", "/v1/experiments/kept").headers["etag"]}
    weights = {"weights": {"old": 0.9, "new": 0.1}}
    assert served.call("PATCH", "/v1/experiments/kept", weights, etag).status_code == 200
    assert len(say(served, name="kept")) == 3
    variants = experiment()["variants"]
    variants[0]["weight"], variants[1]["weight"] = 0.8, 0.2
    assert say(served, name="kept", variants=variants)[-1] == ("running", "serve.yaml")
    assert served.live.store.get("kept").document.weights == {"old": 0.8, "new": 0.2}
    assert len(say(served, name="kept", variants=variants)) == 4


def test_what_cannot_change_under_way_is_refused(served: Lab) -> None:
    say(served, name="fixed")
    for changed in ({"salt": "other"}, {"unit": ["request"]}, {"attach_to": "auto"}):
        with pytest.raises(SettingsError, match="cannot change once it is started"):
            say(served, name="fixed", **changed)
    other = [{**variant, "target": "zoo:upper"} for variant in experiment()["variants"]]
    with pytest.raises(SettingsError, match="variants of 'fixed'"):
        say(served, name="fixed", variants=other)
    gone = [{**variant, "target": "nowhere"} for variant in experiment()["variants"]]
    with pytest.raises(SettingsError, match="'nowhere' does not exist"):
        say(served, name="gone", variants=gone)
    assert "gone" not in served.live.snapshot.by_name


def test_what_the_file_says_is_done_when_the_database_is_back(
    bank: Bank, farm: Bank, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    url = f"sqlite:///{tmp_path / 'data' / 'experiments.sqlite'}"
    with lab([bank, farm], tmp_path / "state", database=url) as served:
        (tmp_path / "data").rename(tmp_path / "away")
        targets, document = served.service.targets, Experiment.model_validate(experiment())
        declare(served.live, [document], targets)
        gone = Experiment.model_validate(
            experiment(
                name="gone",
                variants=[{**each, "target": "no"} for each in experiment()["variants"]],
            )
        )
        declare(served.live, [gone], targets)
        assert served.call("GET", "/health").json()["status"] == "ok"
        (tmp_path / "away").rename(tmp_path / "data")
        assert eventually(lambda: "trial" in served.live.snapshot.by_name, 30)
        assert served.live.store.get("trial").state == "running"
        assert [stored.name for stored in served.live.store.list()] == ["trial"]


def test_the_file_is_read_and_its_faults_are_told(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    text = """
banks: [zoo]
state: kept
experiments:
  - name: trial
    variants:
      - {name: a, target: auto, weight: 0.5, control: true}
      - {name: b, target: zoo, weight: WEIGHT}
"""
    file.write_text(text.replace("WEIGHT", "0.5"))
    settings = read_settings(file, {"database": "sqlite:///x"})
    assert (settings.experiments[0].name, settings.database) == ("trial", "sqlite:///x")
    for wrong, told in (("0.4", "sum to 0.9"), ("much", "experiments.0.variants.1.weight")):
        file.write_text(text.replace("WEIGHT", wrong))
        with pytest.raises(SettingsError, match=told):
            read_settings(file, {})


def test_experiments_need_a_folder() -> None:
    plain = ServeSettings(banks=("zoo",), state="none")
    assert plain.open_experiments(None) is None
    wanted = ServeSettings(banks=("zoo",), state="none", database="sqlite:///x")
    with pytest.raises(SettingsError, match="--state"):
        wanted.open_experiments(None)
