"""From raw bodies to request models."""

from __future__ import annotations

import httpx
import pytest

from .conftest import Served


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/route"])
def test_half_a_surrogate_pair_is_told_of(served: Served, path: str) -> None:
    content = '{"model": "zoo", "prompt": "0", "messages": [], "user": "\\ud800"}'
    refused = httpx.post(served.url + path, content=content, timeout=60)
    assert refused.status_code == 400
    assert "half a surrogate pair" in refused.json()["error"]["message"]
