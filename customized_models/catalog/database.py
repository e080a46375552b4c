"""The database: transactions, and their errors as ours."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc, pool
from sqlalchemy.engine import URL, make_url

from ..errors import AlreadyExistsError, DatabaseError, UnsupportedError, shown
from ..files.writing import disk_errors, make_directories
from .schema import VERSION, metadata

_log = logging.getLogger(__name__)

BUSY_SECONDS = 30.0  # half a lease: whoever waits for the database longer could lose what it holds


class Database:
    """Opens a connection per transaction and keeps none: safe over threads, forks and pickling.

    Args:
        url: As SQLAlchemy takes it; `sqlite:///<path>` here.

    Raises:
        UnsupportedError: It is another URL, which may have a password, so the message has it not.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._has_tables = False  # once it is seen to have them, it is not asked again
        try:
            parsed: URL | None = make_url(url)
        except exc.ArgumentError:
            parsed = None
        if (
            parsed is None
            or parsed.drivername not in ("sqlite", "sqlite+pysqlite")
            or parsed.query
            or parsed.host
            or not parsed.database
            or parsed.database.startswith((":", "~", "file:"))
        ):
            raise UnsupportedError(
                "a registry's database is a file of SQLite's, sqlite:///<path>, with the path as "
                "it is: without ~, options or :memory:"
            )
        self._file = Path(parsed.database)

    def __repr__(self) -> str:
        return f"Database({self.url!r})"

    def __reduce__(self) -> tuple[type[Database], tuple[str]]:
        return Database, (self.url,)

    @functools.cached_property
    def _engine(self) -> Engine:
        """Opens connections; nothing is opened or made yet."""
        engine = create_engine(
            self.url, poolclass=pool.NullPool, connect_args={"timeout": BUSY_SECONDS}
        )
        event.listen(engine, "connect", _sqlite_connection)
        event.listen(engine, "begin", _sqlite_begin)
        return engine

    @functools.cached_property
    def _made(self) -> Engine:
        """As `_engine`, once there are tables."""
        with disk_errors("the registry's directory cannot be made"):
            make_directories(self._file.parent)
        with self._engine.begin() as connection:
            if not _has_tables(connection):
                metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version={VERSION}")
                _log.info("made a registry: %s", self._file)
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that may change rows; rolled back if the block raises.

        Raises:
            AlreadyExistsError: A unique column has a value already.
            DatabaseError: It cannot be used; `outcome_unknown` where it failed at the commit.
        """
        with _errors_translated():
            connection = self._made.connect()
            with connection:
                transaction = connection.begin()
                try:
                    yield connection
                except BaseException:
                    transaction.rollback()
                    raise
                with _commit_errors_marked():
                    transaction.commit()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that sees a single state of the database.

        Where there is no database yet, it sees an empty one, and none is made.
        """
        with _errors_translated():
            if not self._exists:
                with create_engine("sqlite://", poolclass=pool.NullPool).begin() as connection:
                    metadata.create_all(connection)
                    yield connection
                return
            with self._engine.execution_options(reading=True).begin() as connection:
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
            if self._file.is_file():
                with self._engine.execution_options(reading=True).begin() as connection:
                    self._has_tables = _has_tables(connection)
                return self._has_tables
            if self._file.parent.exists() and not self._file.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(self._file.parent))
        _log.debug("there is no registry yet: %s", self._file)
        return False

    def rows(self, statement: Any) -> list[Any]:
        """What a select finds, in a transaction of its own."""
        with self.read() as connection:
            return list(connection.execute(statement).mappings())


def _has_tables(connection: Connection) -> bool:
    """Whether a database has tables; `DatabaseError` if they are of another version."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version not in (0, VERSION):
        raise DatabaseError(
            f"the registry has database version {version}, this library knows {VERSION}: "
            f"install the version of customized-models that made it"
        )
    return bool(version)


def _sqlite_connection(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours, below
    cursor = connection.cursor()
    for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute("PRAGMA trusted_schema=OFF")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def _errors_translated() -> Iterator[None]:
    try:
        yield
    except exc.IntegrityError as error:
        raise AlreadyExistsError(f"taken: {shown(error.orig)}") from error
    except exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise DatabaseError(f"the registry's database cannot be used: {shown(cause)}") from error


@contextmanager
def _commit_errors_marked() -> Iterator[None]:
    """A commit that finds the database busy has changed nothing; of other failures none knows."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        if str(getattr(cause, "sqlite_errorname", "")).startswith("SQLITE_BUSY"):
            raise
        raise DatabaseError(
            f"the registry's database failed at the commit: {shown(cause)}; whether the change "
            f"was made is not known",
            outcome_unknown=True,
        ) from error
