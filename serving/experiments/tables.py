"""The tables. A change of them needs a revision in migrations/versions; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from .records import Exposure, Feedback, Outcome, Record, ShadowPair, StoredRequest

PREFIX = "mergeroute_"  # the database may be shared with other programs
metadata = MetaData()

Sequence = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts in its INTEGER PRIMARY KEY only."""


def _sequence() -> Column[int]:
    """The order of insertion, whatever the clocks say."""
    return Column("sequence", Sequence, Identity(), primary_key=True)


def _text(name: str, *, is_key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=is_key, nullable=False)


def _number(name: str) -> Column[float]:
    return Column(name, Double, nullable=False)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


secrets = Table(f"{PREFIX}secrets", metadata, _text("name", is_key=True), _text("value"))
"""What the first migration drew: `units` is what their keys are hashed with."""

versions = Table(
    f"{PREFIX}experiment_versions",
    metadata,
    _text("name", is_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("first_version", Integer, nullable=False),
    _text("state"),
    _text("document"),
    Column("allocation", Text),
    _text("ranges"),
    Column("promoted", Text),
    _number("created_at"),
    _number("changed_at"),
    _text("changed_by"),
    _text("reason"),
)
"""Every version of every experiment, and of those that were deleted."""

experiments = Table(
    f"{PREFIX}experiments",
    metadata,
    _text("name", is_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], [versions.c.name, versions.c.version]),
)
"""Those that there are, and at which version each is."""

promotions = Table(
    f"{PREFIX}promotions",
    metadata,
    _sequence(),
    _text("target"),
    _text("experiment"),
    _text("variant"),
    _text("who"),
    _number("at"),
    Column("taken_back_by", Text),
    Column("taken_back_at", Double),
)
"""The last one that was not taken back is the default target."""

exposures = Table(
    f"{PREFIX}exposures",
    metadata,
    _sequence(),
    _text("request_id"),
    _text("experiment"),
    Column("version", Integer, nullable=False),
    _text("variant"),
    _text("unit"),
    _text("unit_kind"),
    _text("caller"),
    _number("at"),
    Column("is_forced", Boolean, nullable=False),
    _text("target"),
    _text("bank"),
    _text("blend"),
    UniqueConstraint("request_id", name=f"{PREFIX}exposures_request_id"),
)
Index(f"{PREFIX}exposures_experiment_unit", exposures.c.experiment, exposures.c.unit)
Index(f"{PREFIX}exposures_unit", exposures.c.unit)

outcomes = Table(
    f"{PREFIX}outcomes",
    metadata,
    _text("request_id", is_key=True),
    _number("at"),
    _number("latency_ms"),
    Column("first_token_ms", Double),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    _text("finish_reason"),
    Column("error", Text),
    Column("status", Integer, nullable=False),
    _number("abstained"),
    _text("blend"),
    sqlite_with_rowid=False,  # found by their key in one step, which sums do for each
)

feedback = Table(
    f"{PREFIX}feedback",
    metadata,
    _text("request_id", is_key=True),
    _text("metric", is_key=True),
    _number("value"),
    _number("at"),
    _text("caller"),
    Column("idempotency_key", Text),
    UniqueConstraint("caller", "idempotency_key", name=f"{PREFIX}feedback_idempotency_key"),
    sqlite_with_rowid=False,
)

shadow_pairs = Table(
    f"{PREFIX}shadow_pairs",
    metadata,
    _sequence(),
    _text("request_id"),
    _text("experiment"),
    _text("variant"),
    _number("at"),
    Column("agrees", Boolean, nullable=False),
    _count("length"),
    _count("other_length"),
    _number("latency_ms"),
    _number("other_latency_ms"),
    Column("score", Double),
    Column("error", Text),
    UniqueConstraint(
        "request_id", "experiment", "variant", name=f"{PREFIX}shadow_pairs_request_id"
    ),
)
Index(f"{PREFIX}shadow_pairs_experiment", shadow_pairs.c.experiment)

requests = Table(
    f"{PREFIX}requests",
    metadata,
    _text("request_id", is_key=True),
    _number("at"),
    _text("path"),
    _text("body"),
    _text("bank"),
    _text("blend"),
    Column("seed", BigInteger),
    _text("target"),
    _text("engine"),
    _text("answer"),
)
Index(f"{PREFIX}requests_at", requests.c.at)

TABLES: dict[type[Record], Table] = {
    Exposure: exposures,
    Outcome: outcomes,
    Feedback: feedback,
    ShadowPair: shadow_pairs,
    StoredRequest: requests,
}
"""Where records of a kind lie."""
