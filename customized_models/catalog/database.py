"""The registry's database: tables, transactions and leases.

Imported only when a registry is first used, because it imports SQLAlchemy.
"""

from __future__ import annotations

import functools
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    exc,
    insert,
    pool,
    select,
    update,
)

from ..errors import AlreadyExistsError, DatabaseError, InUseError, JobLost, shown
from ..storage.local import make_directories

VERSION = 1
BUSY_SECONDS = 120.0
LEASE_SECONDS = 15.0

metadata = MetaData()


def _table(name: str, *columns: Column[Any]) -> Table:
    """A level's table: `seq` orders, `name` is unique, `value` is the frozen value as JSON."""
    return Table(
        name,
        metadata,
        Column("seq", Integer, primary_key=True),
        Column("name", String, nullable=False, unique=True),
        *columns,
        Column("value", Text, nullable=False),
        sqlite_autoincrement=True,
    )


def _text(name: str, **options: Any) -> Column[Any]:
    return Column(name, String, nullable=False, **options)


base_models = _table(
    "base_models",
    _text("model_name", unique=True),
    _text("path"),
    Column("files", Text, nullable=False),
)
customized_models = _table(
    "customized_models",
    Column("base", String, ForeignKey("base_models.name"), nullable=False, index=True),
    _text("train_name", index=True),
    _text("training_id", unique=True),
    Column("deleting", Integer, nullable=False, default=0),
)
complete_models = _table(
    "complete_models",
    _text("customized", index=True),
    _text("base", index=True),
    _text("train_name", index=True),
    Column("deleting", Integer, nullable=False, default=0),
)
live_models = _table(
    "live_models",
    _text("source", index=True),
    _text("base", index=True),
    _text("train_name", index=True),
    _text("environment", index=True),
    _text("state", index=True),
    Column("artifact", String, nullable=True),
)
third_party_models = _table("third_party_models")
environments = _table("environments")
reservations = Table(
    "reservations",
    metadata,
    Column("training_id", String, primary_key=True),
    _text("name", unique=True),
    _text("base"),
    _text("train_name"),
    _text("created"),
)
jobs = Table(
    "jobs",
    metadata,
    Column("seq", Integer, primary_key=True),
    _text("id", unique=True),
    _text("kind"),
    _text("name", unique=True),  # of the model it makes
    _text("state", index=True),
    Column("arguments", Text, nullable=False),
    _text("phase"),
    Column("done", Integer, nullable=False, default=0),
    Column("total", Integer, nullable=False, default=0),
    Column("cancel", Integer, nullable=False, default=0),
    Column("error_type", String),
    Column("error", Text),
    _text("created"),
    sqlite_autoincrement=True,
)
leases = Table(
    "leases",
    metadata,
    Column("owner", String, primary_key=True),  # a job's id, or a checkout's
    Column("key", String, primary_key=True),  # what must not go away meanwhile
    _text("purpose"),
    Column("until", Float, nullable=False),  # seconds since the epoch
)


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


class Database:
    """Opens a connection per transaction and keeps none: safe over threads, forks and pickling."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[Database], tuple[Path]]:
        return Database, (self.path,)

    @functools.cached_property
    def _engine(self) -> Engine:
        make_directories(self.path.parent)
        engine = create_engine(
            f"sqlite:///{self.path}",
            poolclass=pool.NullPool,
            connect_args={"timeout": BUSY_SECONDS},
        )
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
        """One transaction that may change rows; rolled back if the block raises."""
        with _errors_translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that sees a single state of the database."""
        engine = self._engine.execution_options(reading=True)
        with _errors_translated(), engine.begin() as connection:
            yield connection

    def rows(self, statement: Any) -> list[Any]:
        """What a select finds."""
        with self.read() as connection:
            return list(connection.execute(statement).mappings())


@contextmanager
def _errors_translated() -> Iterator[None]:
    try:
        yield
    except exc.IntegrityError as error:
        raise AlreadyExistsError(f"taken: {shown(error.orig)}") from error
    except exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise DatabaseError(f"the registry's database cannot be used: {shown(cause)}") from error


def add(connection: Connection, table: Table, **values: Any) -> None:
    """Insert a row.

    Raises:
        AlreadyExistsError: a unique column has that value already.
    """
    connection.execute(insert(table).values(**values))


def find(connection: Connection, table: Table, **equals: Any) -> Any | None:
    """The one row in which the columns have these values, or None."""
    query = select(table).where(*(table.c[key] == value for key, value in equals.items()))
    return connection.execute(query).mappings().one_or_none()


def names(connection: Connection, table: Table, **equals: Any) -> list[str]:
    """The names of the rows in which the columns have these values."""
    query = select(table.c.name).where(*(table.c[key] == value for key, value in equals.items()))
    return list(connection.execute(query).scalars())


def change(connection: Connection, table: Table, name: str, **values: Any) -> None:
    """Set columns of the row with that name."""
    connection.execute(update(table).where(table.c.name == name).values(**values))


def remove(connection: Connection, table: Table, name: str) -> None:
    """Delete the row with that name, if there is one."""
    connection.execute(delete(table).where(table.c.name == name))


def take_lease(connection: Connection, owner: str, keys: Iterable[str], purpose: str) -> None:
    """Hold `keys` for `LEASE_SECONDS`, so that `refuse_if_leased` refuses them."""
    until = time.time() + LEASE_SECONDS
    for key in keys:
        end_lease(connection, owner, key)
        add(connection, leases, owner=owner, key=key, purpose=purpose, until=until)


def end_lease(connection: Connection, owner: str, key: str | None = None) -> None:
    """Release what `owner` holds: one key, or everything."""
    held = delete(leases).where(leases.c.owner == owner)
    connection.execute(held if key is None else held.where(leases.c.key == key))


def lease_holds(connection: Connection, owner: str) -> bool:
    """Whether `owner` still holds its keys: not expired, not taken from it."""
    held = select(leases.c.key).where(leases.c.owner == owner, leases.c.until > time.time())
    return connection.execute(held).first() is not None


def refuse_if_leased(connection: Connection, key: str) -> None:
    """Raise `InUseError` if anyone holds `key`; take it from those whose lease has expired."""
    connection.execute(delete(leases).where(leases.c.until <= time.time()))
    row = connection.execute(select(leases.c.purpose).where(leases.c.key == key)).first()
    if row is not None:
        raise InUseError(f"{shown(key)} is in use by {row.purpose}")


class Lease:
    """Renews what `owner` holds, from a thread, while the block lasts; then releases it.

    `lost` is set when the lease could not be renewed in time: someone may have deleted the keys.
    """

    def __init__(self, database: Database, owner: str | None = None) -> None:
        self.owner = owner or uuid.uuid4().hex
        self.lost = threading.Event()
        self._database = database
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._ended:
            with self._database.write() as connection:
                end_lease(connection, self.owner)

    def end(self, connection: Connection) -> None:
        """Release in the transaction that counts, so that nothing is left to do after it."""
        end_lease(connection, self.owner)
        self._ended = True

    def check(self, connection: Connection) -> None:
        """Raise `JobLost` unless the lease still holds: call it in the transaction that counts."""
        if not lease_holds(connection, self.owner):
            raise JobLost("this process was stopped for longer than its lease; nothing was changed")

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 4):
            try:
                with self._database.write() as connection:
                    renewed = connection.execute(
                        update(leases)
                        .where(leases.c.owner == self.owner, leases.c.until > time.time())
                        .values(until=time.time() + LEASE_SECONDS)
                    )
            except DatabaseError:
                continue  # busy or out of reach: the next round may succeed, or `lost` tells
            if not renewed.rowcount:
                self.lost.set()
                return
