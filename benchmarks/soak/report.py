"""A soak's figures, to be read by people and by programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from .soaking import Result


def figures(result: Result) -> dict[str, Any]:
    """Everything as a JSON document."""
    ledger = result.ledger
    first, last = result.thirds("rss")
    rss = [sample.rss for sample in result.samples]
    return {
        "plan": asdict(result.plan),
        "requests": dict(ledger.requests.most_common()),
        "statuses": {str(k): v for k, v in sorted(ledger.statuses.items())},
        "changes": dict(ledger.changes),
        "checked": dict(ledger.answers),
        "wrong": ledger.wrong,
        "violations": ledger.violations[:20],
        "rss_mb": {
            "begin": rss[0] / 1e6,
            "first_third": first / 1e6,
            "last_third": last / 1e6,
            "end": rss[-1] / 1e6,
            "max": max(rss) / 1e6,
            "growth": last / first - 1,
            "every_minute": [round(value / 1e6, 1) for value in rss[::60]],
        },
        "files": _span(result, "files"),
        "threads": _span(result, "threads"),
        "seconds": {k: _percentiles(v) for k, v in sorted(ledger.seconds.items())},
        "first_text_s": _percentiles(ledger.first_s),
        "exit_status": result.exit_status,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """The same for people."""
    answers = Table("what", "count", title="asked and answered")
    rows = {
        "requests": sum(found["requests"].values()),
        **{f"  {kind}": count for kind, count in found["requests"].items()},
        "changes of modules": sum(found["changes"].values()),
        **{f"  {kind}": count for kind, count in found["changes"].items()},
        **{f"status {status}": count for status, count in found["statuses"].items()},
        **{f"answers checked, {kind}": count for kind, count in found["checked"].items()},
        "wrong answers": found["wrong"],
        "violations": len(found["violations"]),
    }
    for what, count in rows.items():
        answers.add_row(what, f"{count:,}")
    times = Table("seconds", "p50", "p99", "most", title="until the whole answer")
    spans = {**found["seconds"], "a stream's first text": found["first_text_s"]}
    for kind, span in spans.items():
        times.add_row(kind, *(f"{span[key]:.3f}" for key in ("p50", "p99", "max")))
    rss = found["rss_mb"]
    process = Table("process", "first third", "last third", "most", title="what it took")
    share = f"{rss['last_third']:.1f} MB ({rss['growth']:+.2%})"
    process.add_row("memory", f"{rss['first_third']:.1f} MB", share, f"{rss['max']:.1f} MB")
    for name in ("files", "threads"):
        span = found[name]
        process.add_row(
            name, f"{span['first_third']:g}", f"{span['last_third']:g}", f"{span['max']}"
        )
    return [answers, times, process]


def _span(result: Result, name: str) -> dict[str, Any]:
    first, last = result.thirds(name)
    idle = [getattr(sample, name) for sample in result.idle or ()]
    return {
        "first_third": first,
        "last_third": last,
        "max": max(getattr(sample, name) for sample in result.samples),
        "idle_before_and_after": idle,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    at = {"p50": 0.5, "p99": 0.99}
    return {
        **{name: ordered[int(share * (len(ordered) - 1))] for name, share in at.items()},
        "max": ordered[-1],
        "count": len(values),
    }
