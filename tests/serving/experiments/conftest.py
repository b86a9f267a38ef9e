"""Both databases: SQLite always, PostgreSQL where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, make_url, text

from mergeroute.adapters.backbone import Backbone
from mergeroute.adapters.bank import Bank
from mergeroute.serving.experiments.database import Database
from mergeroute.serving.experiments.store import Store

from ..conftest import write_routed_bank
from .postgres import Cluster, binaries
from .shapes import experiment

GIVEN = "MERGEROUTE_TEST_POSTGRES"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL that tests may stop and start."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    cluster = Cluster(programs)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """Of a server whose user may make databases."""
    given = os.environ.get(GIVEN)
    if given is None and binaries() is None:
        pytest.skip(f"no PostgreSQL: install it, or set {GIVEN} to an SQLAlchemy URL")
    return given or str(request.getfixturevalue("cluster").url())


@pytest.fixture
def new_postgres(postgres_url: str) -> Iterator[str]:
    """The URL of an empty database."""
    name = f"mergeroute_{uuid4().hex}"
    url = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield url.set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
    finally:
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/experiments.sqlite"
    return str(request.getfixturevalue("new_postgres"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database, of each kind."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> Store:
    """On an empty database, of each kind."""
    return Store(database)


@pytest.fixture
def ties(store: Store) -> Store:
    """A store with the experiment that the records are of."""
    with store.changing() as experiments:
        experiments.create(experiment(), who="ann")
    return store


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory, checkpoint: Backbone) -> Bank:
    """A second bank on the backbone of `bank`."""
    folder = tmp_path_factory.mktemp("farms") / "farm"
    return write_routed_bank(folder, name="farm", backbone=checkpoint, seed=50)
