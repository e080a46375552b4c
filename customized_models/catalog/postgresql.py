"""A registry's rows in a database of PostgreSQL's, shared by hosts.

One transaction at a time writes: each takes a lock that belongs to the registry, so that what it
has looked up still holds when it writes. Reading waits for nobody.

Each transaction that writes leaves its id in a table. Where a connection is lost during COMMIT,
whether the id is there tells whether the commit was made.

Who waits is told of events and of jobs by NOTIFY, on a connection that is open meanwhile, and looks
now and then all the same: a connection can be lost, and poolers such as PgBouncer pass nothing on.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Lock, Thread
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

_log = logging.getLogger(__name__)

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

_TELLING = (
    "CREATE FUNCTION registry_tells() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN PERFORM pg_notify('customized_models', TG_TABLE_SCHEMA); RETURN NULL; END $$",
    "CREATE TRIGGER events_tell AFTER INSERT ON events "
    "FOR EACH STATEMENT EXECUTE FUNCTION registry_tells()",
    "CREATE TRIGGER jobs_tell AFTER UPDATE ON jobs "
    "FOR EACH ROW WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION registry_tells()",
)
"""The server sends what a transaction tells once that is committed."""

_LISTEN_SECONDS = 1.0  # between looks whether anybody waits still, and attempts to connect


class PostgreSQL:
    """The first schema of the search path at `postgresql+psycopg://...`. See `Dialect`."""

    has_clock = True
    poll_seconds = 0.5  # a look opens a connection, which takes some milliseconds

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
        for statement in _ONLY_ADDED + _TELLING:
            connection.exec_driver_sql(statement)
        connection.execute(insert(_registry).values(version=VERSION))

    def continue_numbers(self, connection: Connection, table: Table) -> None:
        """See `Dialect`."""
        numbers = func.pg_get_serial_sequence(table.name, "seq")
        connection.execute(select(func.setval(numbers, func.max(table.c.seq))))

    def clock(self, connection: Connection) -> float:
        """See `Dialect`; the server's, now, since 1970."""
        now = "SELECT extract(epoch FROM clock_timestamp())::float8"
        return float(connection.exec_driver_sql(now).scalar_one())

    def telling(self, event: Event) -> AbstractContextManager[None]:
        """See `Dialect`."""
        key = os.getpid(), self._url
        return _listeners.setdefault(key, _Listener(self.engine)).telling(event)

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


class _Listener:
    """Listens in a thread, on one connection for all that wait in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[Event] = []
        self._lock = Lock()
        self._runs = False

    @contextmanager
    def telling(self, event: Event) -> Iterator[None]:
        with self._lock:
            self._waiting.append(event)
            if not self._runs:
                self._runs = True
                Thread(target=self._run, daemon=True, name="registry listener").start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.remove(event)

    def _run(self) -> None:
        while self._is_needed():
            try:
                with self._engine.connect() as connection:
                    self._listen(connection.execution_options(isolation_level="AUTOCOMMIT"))
            except (exc.SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error) as error:
                _log.debug("nothing is told of changes: %s", type(error).__name__)
                time.sleep(_LISTEN_SECONDS)

    def _listen(self, connection: Connection) -> None:
        connection.exec_driver_sql("LISTEN customized_models")
        schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
        driver: Any = connection.connection.driver_connection
        self._tell()  # something may have happened since they looked
        while self._is_needed():
            for notice in driver.notifies(timeout=_LISTEN_SECONDS):
                if notice.payload == schema:
                    self._tell()

    def _is_needed(self) -> bool:
        with self._lock:
            self._runs = bool(self._waiting)
            return self._runs

    def _tell(self) -> None:
        with self._lock:
            for event in self._waiting:
                event.set()


_listeners: dict[tuple[int, URL], _Listener] = {}
"""By process, so that a fork has its own, and by database."""

_SECRETS = ("password", "sslpassword")
"""Options of a URL that nobody else may see."""
