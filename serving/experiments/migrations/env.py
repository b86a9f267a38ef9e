"""What Alembic runs: the revisions, in the transaction of the connection it is given."""

from __future__ import annotations

from alembic import context

from mergeroute.serving.experiments.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
