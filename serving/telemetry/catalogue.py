"""Every metric of ours: its name, what it counts and its labels. docs/metrics.md is made of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFIX = "mergeroute_"
Kind = Literal["counter", "gauge", "histogram", "summary"]

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
MODULES = (0, 1, 2, 3, 4, 6, 8, 16, 32)


@dataclass(frozen=True)
class Spec:
    """A metric. name: without prefix and without a counter's `_total`."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """As it is exposed."""
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


RECORDED: Sequence[Spec] = (
    Spec(
        "requests",
        "counter",
        "Answers. Status 499: the client left before the end. Route: as written in the API's "
        "document, or unknown",
        ("route", "status"),
    ),
    Spec(
        "refused_requests",
        "counter",
        "Answers that are errors, and streams that ended in one, by its code, or its type where it "
        "has none",
        ("reason",),
    ),
    Spec("key_requests", "counter", "Answers by name of the API key; anybody: no key", ("key",)),
    Spec("key_tokens", "counter", "Tokens of prompts and answers, by API key", ("key",)),
    Spec("decisions", "counter", "Prompts by what decided", ("bank", "router")),
    Spec("abstentions", "counter", "Prompts that a router left to the backbone alone", ("bank",)),
    Spec("abstained", "counter", "Weight that stayed on the backbone", ("bank",)),
    Spec(
        "module_weight",
        "counter",
        "Weight that blends gave to modules, in absolute value",
        ("bank", "module"),
    ),
    Spec("module_hits", "counter", "Prompts that were answered with a module", ("bank", "module")),
    Spec("blend_modules", "histogram", "Modules of a prompt's blend", ("bank",), MODULES),
    Spec("routing_seconds", "histogram", "Time to route a prompt", ("bank",), SECONDS),
    Spec(
        "queue_seconds", "histogram", "From a choice's submission to its slot", ("bank",), SECONDS
    ),
    Spec(
        "time_to_first_token_seconds",
        "histogram",
        "From the request's arrival to its first token",
        ("bank",),
        SECONDS,
    ),
    Spec(
        "inter_token_seconds",
        "histogram",
        "Between two tokens of a choice",
        ("bank",),
        TOKEN_SECONDS,
    ),
    Spec(
        "request_seconds",
        "histogram",
        "From the request's arrival to the end of its answer",
        ("bank",),
        SECONDS,
    ),
    Spec("choices", "counter", "Choices by finish reason", ("bank", "reason")),
    Spec("prompt_tokens", "counter", "Tokens of prompts that were answered", ("bank",)),
    Spec("cached_tokens", "counter", "Tokens of these that were in the prefix cache", ("bank",)),
    Spec("completion_tokens", "counter", "Tokens of answers", ("bank",)),
    Spec(
        "exposures",
        "counter",
        "Requests that were given a variant, forced ones too",
        ("experiment", "variant"),
    ),
)
"""Counted as requests end."""

ENGINE = {
    "steps": Spec("engine_steps", "counter", "Forward passes", ("backbone",)),
    "rows": Spec(
        "engine_rows",
        "counter",
        "Requests in all forward passes; over engine_steps: the mean batch",
        ("backbone",),
    ),
    "admitted": Spec(
        "engine_admitted",
        "counter",
        "Choices that got a slot, each of which asked the prefix cache",
        ("backbone",),
    ),
    "reused": Spec(
        "engine_prefix_hits", "counter", "Choices that found a prefix there", ("backbone",)
    ),
    "prompt_tokens": Spec(
        "engine_prompt_tokens", "counter", "Tokens of prompts that were admitted", ("backbone",)
    ),
    "reused_tokens": Spec(
        "engine_reused_tokens",
        "counter",
        "Prompt tokens whose keys and values were reused",
        ("backbone",),
    ),
    "generated_tokens": Spec(
        "engine_generated_tokens", "counter", "Tokens generated", ("backbone",)
    ),
    "running": Spec("engine_running", "gauge", "Choices in the batch", ("backbone",)),
    "waiting": Spec("engine_waiting", "gauge", "Choices that wait for a slot", ("backbone",)),
    "slots": Spec("engine_slots", "gauge", "Most choices in the batch", ("backbone",)),
    "modules": Spec("engine_modules", "gauge", "Modules in the engine's memory", ("backbone",)),
    "silent_s": Spec(
        "engine_silent_seconds",
        "gauge",
        "Since the engine's loop last came round; it grows where a step is stuck",
        ("backbone",),
    ),
}
"""By field of EngineStats, read when asked for."""

RESIDENCY = {
    "registered": Spec(
        "modules_registered", "gauge", "Modules that can be asked for", ("backbone",)
    ),
    "resident": Spec("modules_resident", "gauge", "Modules in memory", ("backbone",)),
    "bytes": Spec("modules_bytes", "gauge", "Memory that these take", ("backbone",)),
    "budget": Spec(
        "modules_budget_bytes", "gauge", "Memory that they may take; absent: any", ("backbone",)
    ),
    "evictions": Spec(
        "module_evictions", "counter", "Modules that made room for others", ("backbone",)
    ),
    "waiting": Spec(
        "requests_waiting_for_modules",
        "gauge",
        "Prompts that wait for a module to be read",
        ("backbone",),
    ),
}
"""By field of ResidencyStats, read when asked for."""

REPLICAS = {
    "is_ready": Spec(
        "replica_ready",
        "gauge",
        "1: the vLLM server takes requests, 0: it starts, or does not answer",
        ("backbone", "replica"),
    ),
    "in_flight": Spec(
        "replica_requests", "gauge", "Requests on a vLLM server", ("backbone", "replica")
    ),
    "restarts": Spec(
        "replica_restarts", "counter", "Times a server was started again", ("backbone", "replica")
    ),
    "modules": Spec("replica_modules", "gauge", "Modules that it serves", ("backbone", "replica")),
}
"""By field of ReplicaState, where vLLM runs the models."""

COLD_LOADS = Spec(
    "module_cold_load_seconds",
    "summary",
    "Reading a module because a prompt asked for it: how often, and how long together",
    ("backbone",),
)
MODULE_RESIDENT = Spec(
    "module_resident",
    "gauge",
    "1: the module is in memory, 0: it would have to be read; `other`: how many of the rest are",
    ("bank", "module"),
)

FEEDBACK = Spec("feedback", "counter", "Feedback that was kept", ("experiment", "metric"))
PAUSES = Spec("guardrail_pauses", "counter", "Pauses by guardrails", ("experiment",))
SHADOWS = Spec(
    "shadows",
    "counter",
    "Requests drawn to be answered once more: started; compared: stored with its pair; dropped: "
    "there was no capacity to spare, before it started or later; failed",
    ("experiment", "result"),
)
EXPERIMENTS = {
    "database_up": Spec(
        "database_up", "gauge", "1: the database of experiments answers, 0: records wait", ()
    ),
    "backlog": Spec("records_backlog", "gauge", "Records that are not in the database yet", ()),
    "backlog_bytes": Spec("records_backlog_bytes", "gauge", "Size of these on disk", ()),
    "dropped": Spec("records_dropped", "counter", "Records there was no room for on disk", ()),
    "refused": Spec("records_refused", "counter", "Records that the database does not take", ()),
    "repeated": Spec(
        "repeated_requests",
        "counter",
        "Requests under the id of an earlier one, which alone counts in its experiment",
        (),
    ),
}
"""By key of LiveExperiments.status, where there can be experiments."""

CATALOGUE: Sequence[Spec] = (
    *RECORDED,
    *ENGINE.values(),
    *RESIDENCY.values(),
    *REPLICAS.values(),
    COLD_LOADS,
    MODULE_RESIDENT,
    FEEDBACK,
    PAUSES,
    SHADOWS,
    *EXPERIMENTS.values(),
)


def table() -> str:
    """The catalogue in Markdown."""
    rows = ["| metric | type | labels | what it tells |", "|---|---|---|---|"]
    for spec in CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        buckets = f"; up to {', '.join(f'{b:g}' for b in spec.buckets)}" if spec.buckets else ""
        rows.append(f"| `{spec.full_name}` | {spec.kind} | {labels} | {spec.text}{buckets} |")
    return "\n".join(rows) + "\n"


def renewed(page: str) -> str:
    """A page with the table in its place."""
    begin, end = "<!-- metrics: begin -->\n", "<!-- metrics: end -->"
    head, _, rest = page.partition(begin)
    return head + begin + table() + end + rest.partition(end)[2]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(renewed(file.read_text()))
