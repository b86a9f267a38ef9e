"""Endpoint: addresses that cannot be, and what is told of those that can."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeroute.adapters.errors import EngineError
from mergeroute.runtime.vllm.endpoint import Endpoint


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"is 1\d\d bytes, the limit is 107: set TMPDIR"):
        Endpoint("vllm-0", "http://vllm", Path("/") / ("x" * 107))
    longest = Endpoint("vllm-0", "http://vllm", Path("/") / ("x" * 106))
    assert not longest.is_open


def test_the_log_alone_tells_where_a_server_of_others_is() -> None:
    assert str(Endpoint("vllm-1", "http://10.0.0.1:8000")) == "vllm-1 at http://10.0.0.1:8000"
    assert str(Endpoint("vllm-1", "http://vllm", Path("/x.sock"))) == "vllm-1"
