"""A registry's rows in a database of PostgreSQL's, shared by hosts.

One transaction at a time writes: each takes a lock that belongs to the registry, so that what it
has looked up still holds when it writes. Reading waits for nobody.

Each transaction that writes leaves its id in a table. Where a connection is lost during COMMIT,
whether the id is there tells whether the commit was made.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    exc,
    func,
    insert,
    pool,
    select,
)
from sqlalchemy.engine import URL

from ..errors import DatabaseError, MissingDependencyError, shown
from .dialect import BUSY_SECONDS
from .schema import VERSION, metadata

_IDLE_SECONDS = BUSY_SECONDS / 2  # whoever is stopped in a transaction loses it before others fail
RECONNECT_SECONDS = _IDLE_SECONDS + 5  # then a transaction of which nothing was heard has ended

_CONNECTION: Mapping[str, Any] = {
    "application_name": "customized_models",
    "connect_timeout": 10,
    # A server that went away without a word is noticed after 25 seconds, not after two hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""What is set unless the URL says otherwise; see "Parameter Key Words" in PostgreSQL's docs."""

_LOCK = (
    f"SET LOCAL lock_timeout = '{BUSY_SECONDS:.0f}s'; "
    f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_SECONDS:.0f}s'; "
    f"SELECT pg_advisory_xact_lock(hashtextextended(current_schema(), 0))"
)

_ours = MetaData()
_registry = Table("registry", _ours, Column("version", Integer, nullable=False))
_commits = Table(
    "commits",
    _ours,
    Column("id", String, primary_key=True),
    Column("begun", DateTime(timezone=True), nullable=False, index=True, server_default=func.now()),
)
_BEGIN = (  # whoever asks does so within a minute
    "WITH forgotten AS (DELETE FROM commits WHERE begun < now() - interval '10 minutes') "
    "INSERT INTO commits (id) VALUES (%s)"
)

_ONLY_ADDED = (
    "CREATE FUNCTION events_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE integrity_constraint_violation USING MESSAGE = 'events are only added'; END $$",
    "CREATE TRIGGER events_refuse BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
    "FOR EACH STATEMENT EXECUTE FUNCTION events_refuse()",
)


class PostgreSQL:
    """The first schema of the search path at `postgresql+psycopg://...`. See `Dialect`."""

    has_clock = True

    def __init__(self, url: URL) -> None:
        self._url = url

    def __str__(self) -> str:
        return self._url.set(query={}).render_as_string(hide_password=True)

    def without_secrets(self, text: str) -> str:
        """See `Dialect`."""
        for secret in (self._url.password, *map(self._url.query.get, _SECRETS)):
            if secret:
                text = text.replace(str(secret), "***")
        return text

    @functools.cached_property
    def engine(self) -> Engine:
        """See `Dialect`."""
        unsaid = {name: _CONNECTION[name] for name in _CONNECTION.keys() - self._url.query.keys()}
        try:
            return create_engine(
                self._url,
                poolclass=pool.NullPool,
                # Statements are not prepared: the connection ends first, and a pooler such as
                # PgBouncer may give each transaction to another server process.
                connect_args={**unsaid, "prepare_threshold": None},
                isolation_level="READ COMMITTED",  # `lock` makes it serial
                use_native_hstore=False,  # there is none, so that it is not asked for
            )
        except ImportError as error:
            raise MissingDependencyError(
                "a database of PostgreSQL's needs psycopg: "
                "pip install 'customized-models[postgres]'"
            ) from error

    def is_reachable(self) -> bool:
        """See `Dialect`; connecting tells."""
        return True

    def make_place(self) -> None:
        """See `Dialect`; the schema is there, or its making is not ours to decide."""

    def version(self, connection: Connection) -> int:
        """See `Dialect`."""
        there = (
            "SELECT count(*) FROM pg_catalog.pg_tables "
            "WHERE schemaname = current_schema() AND tablename = 'registry'"
        )
        if not connection.exec_driver_sql(there).scalar():
            return 0
        return int(connection.execute(select(_registry.c.version)).scalar_one())

    def make_tables(self, connection: Connection) -> None:
        """See `Dialect`."""
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise DatabaseError(
                f"the database has the encoding {shown(encoding)}, and a registry needs UTF8: "
                f"CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
            )
        metadata.create_all(connection, checkfirst=False)
        _ours.create_all(connection, checkfirst=False)
        for statement in _ONLY_ADDED:
            connection.exec_driver_sql(statement)
        connection.execute(insert(_registry).values(version=VERSION))

    def clock(self, connection: Connection) -> float:
        """See `Dialect`; the server's, now, since 1970."""
        now = "SELECT extract(epoch FROM clock_timestamp())::float8"
        return float(connection.exec_driver_sql(now).scalar_one())

    def begin_reading(self, connection: Connection) -> None:
        """See `Dialect`."""
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    def lock(self, connection: Connection) -> None:
        """See `Dialect`. The lock ends with the transaction, however that ends."""
        connection.exec_driver_sql(_LOCK)

    def begin_writing(self, connection: Connection) -> str:
        """See `Dialect`."""
        self.lock(connection)
        id = uuid.uuid4().hex
        connection.exec_driver_sql(_BEGIN, (id,))
        return id

    def was_committed(self, id: str, error: Exception) -> bool | None:
        """See `Dialect`. The lock is free once the transaction has ended, one way or the other."""
        until = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                with self.engine.connect() as connection:
                    self.lock(connection)
                    found = connection.execute(select(_commits.c.id).where(_commits.c.id == id))
                    return found.first() is not None
            except exc.SQLAlchemyError:
                if time.monotonic() > until:
                    return None
                time.sleep(0.2)


_SECRETS = ("password", "sslpassword")
"""Options of a URL that nobody else may see."""
