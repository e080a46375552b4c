"""What differs between databases, as `Database` asks for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from threading import Event
from typing import Protocol

from sqlalchemy import Connection, Engine, Table

BUSY_SECONDS = 30.0  # half a lease: whoever waits for the database longer could lose what it holds


class Dialect(Protocol):
    """One kind of database, at one URL. Making it opens nothing."""

    has_clock: bool
    """Whether `clock` is the same for all hosts."""

    poll_seconds: float
    """Whoever waits for a change looks as often as that, told or not."""

    def __str__(self) -> str:
        """Where the database is, without its password."""

    def without_secrets(self, text: str) -> str:
        """A text of the database's, without its password."""

    @property
    def engine(self) -> Engine:
        """Opens a connection per transaction and keeps none.

        Raises:
            MissingDependencyError: The database's package is not installed.
        """

    def is_reachable(self) -> bool:
        """Whether there is something to be read, which may have no tables yet.

        Raises:
            OSError: There cannot be.
        """

    def make_place(self) -> None:
        """Make what the database needs before it can be written."""

    def version(self, connection: Connection) -> int:
        """The version of the tables; 0 if there are none."""

    def make_tables(self, connection: Connection) -> None:
        """Make the tables of `schema` and note their version, in a transaction that `lock` began.

        Raises:
            DatabaseError: The database cannot hold them.
        """

    def continue_numbers(self, connection: Connection, table: Table) -> None:
        """Let new rows of a table be numbered after those that were added with their numbers."""

    def clock(self, connection: Connection) -> float:
        """Seconds that only count upwards, since any moment."""

    def telling(self, event: Event) -> AbstractContextManager[None]:
        """While the block lasts, set the event soon after anything happens that is waited for.

        That is an event of the registry's, or that a job begins or ends. Nothing relies on it.
        """

    def begin_reading(self, connection: Connection) -> None:
        """Let the transaction see one state of the database."""

    def lock(self, connection: Connection) -> None:
        """Let the transaction be the only one that writes, once others have ended."""

    def begin_writing(self, connection: Connection) -> str:
        """As `lock`, where there are tables; what `was_committed` knows the transaction by."""

    def was_committed(self, id: str, error: Exception) -> bool | None:
        """Whether a commit that failed was made all the same; None if nobody knows."""
