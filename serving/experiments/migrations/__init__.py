"""The database's schema, one revision after the other (Alembic)."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from ...errors import SettingsError

VERSION_TABLE = "mergeroute_schema"
_FOLDER = Path(__file__).parent
_LOCK = 0x6D657267  # of PostgreSQL: one process at a time


def upgrade(connection: Connection, name: str) -> None:
    """Bring the schema to this program's revision. connection: outside a transaction.

    Raises:
        SettingsError: the database has a revision that this program does not know.
    """
    scripts = ScriptDirectory(str(_FOLDER))
    with connection.begin():
        if _current(connection) == scripts.get_current_head():
            return
    connection.execution_options(is_writing=True)
    with connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        _check_known(scripts, _current(connection), name)
        config = Config()
        config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _current(connection: Connection) -> str | None:
    options = {"version_table": VERSION_TABLE}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _check_known(scripts: ScriptDirectory, current: str | None, name: str) -> None:
    try:
        scripts.get_revision(current) if current else None
    except CommandError as error:
        raise SettingsError(
            f"the database {name} has schema {current}, this program knows schemas up to "
            f"{scripts.get_current_head()}: run the program that wrote it, or name another "
            "database with --database"
        ) from error
