"""The tables.

Each table of a level has the value itself as JSON (`value`), the columns by which it is found,
and a `digest` over all of them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

VERSION = 4
"""Of the tables below; a database of another version is refused."""

metadata = MetaData()

# SQLite orders texts by their bytes and has whole numbers of 64 bits. PostgreSQL is told to.
_TEXT = String().with_variant(String(collation="C"), "postgresql")
_WHOLE = Integer().with_variant(BigInteger(), "postgresql")


def _text(name: str, **options: Any) -> Column[Any]:
    return Column(name, _TEXT, nullable=False, **options)


def _level(name: str, *columns: Column[Any]) -> Table:
    """A level's table: `seq` orders, `name` is unique.

    The index holds what a long list is made of. Without it, listing the numbers of all rows would
    read all of their values.
    """
    table = Table(
        name,
        metadata,
        Column("seq", _WHOLE, primary_key=True),
        _text("name", unique=True),
        *columns,
        Column("value", Text, nullable=False),
        _text("digest"),
        sqlite_autoincrement=True,
    )
    if "stage" in table.c:
        Index(f"{name}_listed", table.c.seq, table.c.stage)
    return table


def _created() -> Column[Any]:
    return Column("created", Float, nullable=False, index=True)  # seconds since the epoch


def _size() -> Column[Any]:
    return Column("size", _WHOLE, nullable=True)  # bytes of all content files; None before


def _stages() -> tuple[Column[Any], Column[Any]]:
    """How far a change that reaches beyond the database has come, and whose change it is.

    `stage`: "pending" while it is being made, "visible", "deleting" while it is removed.
    `operation`: the owner of the lease that the change is made under.
    """
    return _text("stage", index=True), _text("operation")


base_models = _level(
    "base_models",
    _text("model_name", unique=True),
    Column("path", _TEXT, nullable=True),  # None after `reindex`, until it is relocated
    Column("files", Text, nullable=False),
    _created(),
)
customized_models = _level(
    "customized_models",
    Column("base", _TEXT, ForeignKey("base_models.name"), nullable=False, index=True),
    _text("train_name", index=True),
    _text("training_id", unique=True),
    _created(),
    _size(),
    *_stages(),
)
complete_models = _level(
    "complete_models",
    _text("customized", index=True),
    _text("base", index=True),
    _text("train_name", index=True),
    _created(),
    _size(),
    Column("evicted", _WHOLE, nullable=False),  # 1 while its bytes are dropped, else 0
    *_stages(),
)
live_models = _level(
    "live_models",
    _text("source", index=True),
    _text("base", index=True),
    _text("train_name", index=True),
    _text("environment", index=True),
    _text("state", index=True),
    Column("artifact", _TEXT, nullable=True),  # the key of the file that it is served from
    _created(),
    *_stages(),
)
third_party_models = _level("third_party_models")
environments = _level("environments")

# What is found beside the values: `level` is the name of a level's table.

metrics = Table(  # made from the values, for searches
    "metrics",
    metadata,
    Column("level", _TEXT, primary_key=True),
    Column("seq", _WHOLE, primary_key=True),
    Column("name", _TEXT, primary_key=True),
    Column("value", Float, nullable=False),
    sqlite_with_rowid=False,
)
# Equal values come newest first: the first index has them so read backwards, the other forwards.
Index("metrics_by_value", metrics.c.level, metrics.c.name, metrics.c.value, metrics.c.seq)
Index(
    "metrics_by_value_newest",
    metrics.c.level, metrics.c.name, metrics.c.value, metrics.c.seq.desc(),
)  # fmt: skip

tags = Table(
    "tags",
    metadata,
    Column("level", _TEXT, primary_key=True),
    Column("name", _TEXT, primary_key=True),
    Column("tag", _TEXT, primary_key=True),
    sqlite_with_rowid=False,
)
Index("tags_by_tag", tags.c.level, tags.c.tag, tags.c.name)
descriptions = Table(
    "descriptions",
    metadata,
    Column("level", _TEXT, primary_key=True),
    Column("name", _TEXT, primary_key=True),
    Column("text", Text, nullable=False),
    sqlite_with_rowid=False,
)
aliases = Table(
    "aliases",
    metadata,
    Column("level", _TEXT, primary_key=True),
    Column("train_name", _TEXT, primary_key=True),
    Column("alias", _TEXT, primary_key=True),
    _text("name"),  # of the model that it stands for now
    Column("protected", _WHOLE, nullable=False),
    sqlite_with_rowid=False,
)
Index("aliases_by_name", aliases.c.level, aliases.c.name)

events = Table(
    "events",
    metadata,
    Column("seq", _WHOLE, primary_key=True),
    Column("time", Float, nullable=False, index=True),  # seconds since the epoch
    _text("who"),
    _text("action", index=True),
    _text("kind"),
    _text("name"),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    sqlite_autoincrement=True,
)
event_subjects = Table(  # the names under which an event is found
    "event_subjects",
    metadata,
    Column("subject", _TEXT, primary_key=True),
    Column("event", _WHOLE, primary_key=True),
    sqlite_with_rowid=False,
)

reservations = Table(
    "reservations",
    metadata,
    Column("training_id", _TEXT, primary_key=True),
    _text("name", unique=True),
    _text("base"),
    _text("train_name"),
    _text("created"),
    _text("digest"),
)
jobs = Table(
    "jobs",
    metadata,
    Column("seq", _WHOLE, primary_key=True),
    _text("id", unique=True),
    _text("kind"),
    _text("name", unique=True),  # of the model it makes
    _text("state", index=True),
    Column("arguments", Text, nullable=False),
    _text("phase"),
    Column("done", _WHOLE, nullable=False),
    Column("total", _WHOLE, nullable=False),
    Column("cancel", _WHOLE, nullable=False),  # 1 once it was asked to stop
    # How many of its registry's jobs may run while it begins; None if an executor runs it.
    Column("max_running", _WHOLE),
    Column("worker", _TEXT),  # the owner of the lease of the last worker that an executor began
    Column("error", Text),  # `errors.to_record` as JSON
    _text("created"),
    Column("started", _TEXT),
    Column("ended", _TEXT),
    _text("digest"),
    sqlite_autoincrement=True,
)
leases = Table(
    "leases",
    metadata,
    Column("owner", _TEXT, primary_key=True),  # a job's id, a checkout's, a publication's
    Column("key", _TEXT, primary_key=True),  # what must not go away meanwhile
    _text("purpose"),
    _text("process"),  # whose it is, as JSON
    Column("renewed", Float, nullable=False),  # by `Database.clock`, in seconds
)
litter = Table(
    "litter",
    metadata,
    Column("key", _TEXT, primary_key=True),
    Column("seen", Float, nullable=False),  # seconds since the epoch
)
