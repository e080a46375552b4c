"""The database: transactions, and their errors as ours."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc, pool
from sqlalchemy.engine import make_url

from ..errors import AlreadyExistsError, DatabaseError, UnsupportedError, shown
from ..files.writing import disk_errors, make_directories
from .schema import VERSION, metadata

BUSY_SECONDS = 30.0  # half a lease: whoever waits for the database longer could lose what it holds


class Database:
    """Opens a connection per transaction and keeps none: safe over threads, forks and pickling.

    Args:
        url: As SQLAlchemy takes it; `sqlite:///<path>` here.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __repr__(self) -> str:
        return f"Database({make_url(self.url).render_as_string(hide_password=True)!r})"

    def __reduce__(self) -> tuple[type[Database], tuple[str]]:
        return Database, (self.url,)

    @functools.cached_property
    def _engine(self) -> Engine:
        url = make_url(self.url)
        if url.get_backend_name() != "sqlite" or not url.database:
            raise UnsupportedError(
                f"a registry's database is sqlite:///<path>, not {shown(url.drivername)}"
            )
        with disk_errors("the registry's directory cannot be made"):
            make_directories(Path(url.database).parent)
        engine = create_engine(url, poolclass=pool.NullPool, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _sqlite_connection)
        event.listen(engine, "begin", _sqlite_begin)
        with _errors_translated(), engine.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version not in (0, VERSION):
                raise DatabaseError(
                    f"the registry has database version {version}, this library knows {VERSION}: "
                    f"install a newer customized-models"
                )
            if version == 0:
                metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version={VERSION}")
        return engine

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that may change rows; rolled back if the block raises.

        Raises:
            AlreadyExistsError: A unique column has a value already.
            DatabaseError: It cannot be used; `outcome_unknown` where it failed at the commit.
        """
        with _errors_translated():
            connection = self._engine.connect()
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
        """One transaction that sees a single state of the database."""
        engine = self._engine.execution_options(reading=True)
        with _errors_translated(), engine.begin() as connection:
            yield connection

    def rows(self, statement: Any) -> list[Any]:
        """What a select finds, in a transaction of its own."""
        with self.read() as connection:
            return list(connection.execute(statement).mappings())


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
