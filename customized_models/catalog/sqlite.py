"""A registry's rows in a file of SQLite's."""

from __future__ import annotations

import errno
import functools
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, pool
from sqlalchemy.engine import URL

from ..errors import UnsupportedError
from ..files.writing import disk_errors, make_directories
from .dialect import BUSY_SECONDS
from .schema import VERSION, metadata


class SQLite:
    """The file at `sqlite:///<path>`. See `Dialect`.

    Raises:
        UnsupportedError: It is no file, or there are options.
    """

    has_clock = False
    poll_seconds = 0.1  # a look takes about a millisecond

    def __init__(self, url: URL) -> None:
        if (
            url.query
            or url.host
            or not url.database
            or url.database.startswith((":", "~", "file:"))
        ):
            raise UnsupportedError(
                "a database of SQLite's is a file, sqlite:///<path>, with the path as it is: "
                "without ~, options or :memory:"
            )
        self._url = url
        self._file = Path(url.database)

    def __str__(self) -> str:
        return f"sqlite:///{self._file}"

    def without_secrets(self, text: str) -> str:
        """See `Dialect`."""
        return text

    @functools.cached_property
    def engine(self) -> Engine:
        """See `Dialect`."""
        engine = create_engine(
            self._url, poolclass=pool.NullPool, connect_args={"timeout": BUSY_SECONDS}
        )
        event.listen(engine, "connect", _prepare)
        return engine

    def is_reachable(self) -> bool:
        """See `Dialect`."""
        if self._file.is_file():
            return True
        if self._file.parent.exists() and not self._file.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(self._file.parent))
        return False

    def make_place(self) -> None:
        """See `Dialect`."""
        with disk_errors("the registry's directory cannot be made"):
            make_directories(self._file.parent)

    def version(self, connection: Connection) -> int:
        """See `Dialect`."""
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())

    def make_tables(self, connection: Connection) -> None:
        """See `Dialect`."""
        metadata.create_all(connection, checkfirst=False)
        for change in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER events_refuse_{change} BEFORE {change} ON events "
                f"BEGIN SELECT RAISE(ABORT, 'events are only added'); END"
            )
        connection.exec_driver_sql(f"PRAGMA user_version={VERSION}")

    def continue_numbers(self, connection: Connection, table: Table) -> None:
        """See `Dialect`; SQLite does so by itself."""

    def clock(self, connection: Connection) -> float:
        """See `Dialect`; this host's."""
        return time.monotonic()

    def telling(self, event: Event) -> AbstractContextManager[None]:
        """See `Dialect`; SQLite tells nothing."""
        return nullcontext()

    def begin_reading(self, connection: Connection) -> None:
        """See `Dialect`."""
        connection.exec_driver_sql("BEGIN")

    def lock(self, connection: Connection) -> None:
        """See `Dialect`."""
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def begin_writing(self, connection: Connection) -> str:
        """See `Dialect`."""
        self.lock(connection)
        return ""

    def was_committed(self, id: str, error: Exception) -> bool | None:
        """See `Dialect`. A commit that finds the database busy has changed nothing."""
        cause = getattr(error, "orig", None)
        busy = str(getattr(cause, "sqlite_errorname", "")).startswith("SQLITE_BUSY")
        return False if busy else None


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours
    cursor = connection.cursor()
    for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute("PRAGMA trusted_schema=OFF")
    cursor.close()
