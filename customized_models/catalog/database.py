"""The database: transactions, and their errors as ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import Event
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, exc, pool
from sqlalchemy.engine import URL, make_url

from ..errors import AlreadyExistsError, DatabaseError, UnsupportedError, shown
from ..files.writing import disk_errors
from .dialect import Dialect
from .postgresql import PostgreSQL
from .schema import VERSION, metadata
from .sqlite import SQLite

_log = logging.getLogger(__name__)

_DIALECTS: Mapping[str, Callable[[URL], Dialect]] = {
    "sqlite": SQLite,
    "sqlite+pysqlite": SQLite,
    "postgresql+psycopg": PostgreSQL,
}
"""By how a URL begins."""


class Database:
    """Opens a connection per transaction and keeps none: safe over threads, forks and pickling.

    Args:
        url: As SQLAlchemy takes it: `sqlite:///<path>`, or `postgresql+psycopg://...`.

    Raises:
        UnsupportedError: It is another URL, which may have a password, so the message has it not.

    Attributes:
        url: Perhaps with a password; `repr` has none.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._dialect = _dialect(url)
        self._has_tables = False  # once it is seen to have them, it is not asked again

    def __repr__(self) -> str:
        return f"Database({str(self._dialect)!r})"

    def __reduce__(self) -> tuple[type[Database], tuple[str]]:
        return Database, (self.url,)

    @property
    def has_clock(self) -> bool:
        """Whether `clock` is one for all hosts."""
        return self._dialect.has_clock

    def clock(self, connection: Connection) -> float:
        """Seconds since any moment, by the database's clock; by this host's if it has none."""
        return self._dialect.clock(connection)

    @property
    def poll_seconds(self) -> float:
        """How long to wait for a change between two looks."""
        return self._dialect.poll_seconds

    def telling(self, event: Event) -> AbstractContextManager[None]:
        """See `Dialect.telling`."""
        return self._dialect.telling(event)

    def continue_numbers(self, connection: Connection) -> None:
        """Let rows that are added be numbered after all that are there."""
        for table in metadata.sorted_tables:
            if table.autoincrement_column is not None:
                self._dialect.continue_numbers(connection, table)

    @functools.cached_property
    def _made(self) -> Engine:
        """Opens connections, once there are tables."""
        self._dialect.make_place()
        with self._dialect.engine.begin() as connection:
            self._dialect.lock(connection)
            if not self._tables_in(connection):
                self._dialect.make_tables(connection)
                _log.info("made a registry: %s", self._dialect)
        return self._dialect.engine

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that may change rows; rolled back if the block raises.

        Raises:
            AlreadyExistsError: A unique column has a value already.
            DatabaseError: It cannot be used; `outcome_unknown` where it failed at the commit.
        """
        with self._errors_translated():
            connection = self._made.connect()
            with connection:
                transaction = connection.begin()
                try:
                    id = self._dialect.begin_writing(connection)
                    yield connection
                except BaseException:
                    transaction.rollback()
                    raise
                with self._commit_errors_settled(id):
                    transaction.commit()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that sees a single state of the database.

        Where there is no database yet, it sees an empty one, and none is made.
        """
        with self._errors_translated():
            if not self._exists:
                with create_engine("sqlite://", poolclass=pool.NullPool).begin() as connection:
                    metadata.create_all(connection)
                    yield connection
                return
            with self._reading() as connection:
                yield connection

    @property
    def _exists(self) -> bool:
        """Whether there is a database with tables.

        Raises:
            StorageError: Its directory is a file.
            DatabaseError: It is of another version.
        """
        if self._has_tables:
            return True
        with disk_errors("the registry cannot be opened"):
            if self._dialect.is_reachable():
                with self._reading() as connection:
                    self._has_tables = self._tables_in(connection)
                return self._has_tables
        _log.debug("there is no registry yet: %s", self._dialect)
        return False

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._dialect.engine.connect() as connection:  # rolled back: there is no change
            self._dialect.begin_reading(connection)
            yield connection

    def rows(self, statement: Any) -> list[Any]:
        """What a select finds, in a transaction of its own."""
        with self.read() as connection:
            return list(connection.execute(statement).mappings())

    def _tables_in(self, connection: Connection) -> bool:
        """Whether there are tables; `DatabaseError` if they are of another version."""
        version = self._dialect.version(connection)
        if version not in (0, VERSION):
            raise DatabaseError(
                f"the registry has database version {version}, this library knows {VERSION}: "
                f"install the version of customized-models that made it"
            )
        return bool(version)

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError as error:
            raise AlreadyExistsError(f"taken: {self._cause(error)}") from error
        except exc.SQLAlchemyError as error:
            raise DatabaseError(
                f"the registry's database cannot be used: {self._cause(error)}"
            ) from error

    @contextmanager
    def _commit_errors_settled(self, id: str) -> Iterator[None]:
        """Find out whether a commit that failed was made; an error only if it was not."""
        try:
            yield
        except exc.SQLAlchemyError as error:
            made = self._dialect.was_committed(id, error)
            if made is False:
                raise
            if made is None:
                raise DatabaseError(
                    f"the registry's database failed at the commit: {self._cause(error)}; whether "
                    f"the change was made is not known",
                    outcome_unknown=True,
                ) from error
            _log.warning("a commit was made, though the database failed: %s", self._cause(error))

    def _cause(self, error: exc.SQLAlchemyError) -> str:
        cause = getattr(error, "orig", None) or error
        return shown(self._dialect.without_secrets(str(cause)))


def _dialect(url: str) -> Dialect:
    """What a URL's database is.

    Raises:
        UnsupportedError: None that is known here.
    """
    parsed = dialect = None
    try:
        parsed = make_url(url)
        dialect = _DIALECTS.get(parsed.drivername)
    except (exc.ArgumentError, ValueError):  # the latter of a port that is no number
        pass
    if parsed is None or dialect is None:
        raise UnsupportedError(
            "a registry's database is a file of SQLite's, sqlite:///<path>, or one of "
            "PostgreSQL's, postgresql+psycopg://<user>@<host>/<database>"
        )
    return dialect(parsed)
