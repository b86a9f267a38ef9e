"""Servers whose chat templates have tools, in the two spellings."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from mergeroute.adapters.backbone import Backbone
from mergeroute.runtime.options import EngineOptions
from mergeroute.serving.hosting import Placement, host_banks
from mergeroute.serving.service import Service

from ...tiny import make_model, make_tokenizer
from ..conftest import Served, running, write_routed_bank

HERMES = """
{%- for t in tools or [] %}<tools>{{ t | tojson }}</tools>{% endfor %}
{%- for m in messages %}<|user|>{{ m.role }}:{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|user|>{% endif %}"""
LLAMA = """
{%- for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}<|user|>{{ m.role }}:{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ '{"name": "' + c.function.name + '", ' }}
{{- '"parameters": ' }}{{ c.function.arguments | tojson }}}{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|user|>{% endif %}"""


@pytest.fixture(scope="package", params=[HERMES, LLAMA], ids=["hermes", "llama3"])
def calling(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server whose model is told of tools."""
    folder = tmp_path_factory.mktemp("calling")
    make_model(max_position_embeddings=1024).save_pretrained(folder / "backbone")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(folder / "backbone")
    bank = write_routed_bank(
        folder / "bank", name="zoo", backbone=Backbone.open(folder / "backbone")
    )
    placement = Placement(dtype="float32", options=EngineOptions(max_concurrency=8))
    service = Service(host_banks([bank], placement))
    with (
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(url, service, bank, client)
