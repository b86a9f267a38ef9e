"""Watch: whatever happens to it, it goes on looking after its server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mergeroute.runtime.vllm.endpoint import Endpoint
from mergeroute.runtime.vllm.options import VllmOptions
from mergeroute.runtime.vllm.replicas import Replica, Replicas
from mergeroute.runtime.vllm.watch import Watch

from .fake import Fake, upstream
from .fleet import QUICK, wait_for


@dataclass(frozen=True)
class Moody(Endpoint):
    """Fails to be looked at as often as it holds faults."""

    faults: list[Exception] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        if self.faults:
            raise self.faults.pop()
        return True


@contextmanager
def watching(endpoint: Endpoint, folder: Path, wanted: Sequence[str] = ()) -> Iterator[Watch]:
    replica = Replica(endpoint)
    options = VllmOptions(urls=(endpoint.url,), modules_folder=folder, **QUICK)
    watch = Watch(replica, Replicas([replica]), options, lambda: wanted)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
    assert replica.state == "stopped"


def test_what_nobody_thought_of_is_logged_and_the_watch_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [OSError(24, "Too many open files"), AttributeError("no such thing")]
    with upstream(Fake()) as url:
        endpoint = Moody("vllm-0", url, faults=faults)
        with watching(endpoint, tmp_path) as watch:
            wait_for(lambda: watch.replica.state == "ready")
    assert watch.failure is not None
    assert "vLLM server vllm-0 at http://127.0.0.1" in watch.failure
    assert "Too many open files" in caplog.text
    assert "Traceback" in caplog.text


def test_a_module_that_is_long_in_loading_does_not_end_the_looks(tmp_path: Path) -> None:
    fake = Fake(loading="hang")
    with (
        upstream(fake) as url,
        watching(Endpoint("vllm-0", url), tmp_path, ["0" * 32]) as watch,
    ):
        wait_for(lambda: watch.replica.state == "ready")
        fake.is_ill = True
        wait_for(lambda: watch.replica.state == "lost")
        fake.loading, fake.is_ill = "", False
        wait_for(lambda: watch.replica.modules == {"0" * 32})
