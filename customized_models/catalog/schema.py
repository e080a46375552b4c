"""The tables.

Each table of a level has the value itself as JSON (`value`), the columns by which it is found,
and a `digest` over all of them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Float, ForeignKey, Integer, MetaData, String, Table, Text

VERSION = 2
"""Of the tables below; a database of another version is refused."""

metadata = MetaData()


def _text(name: str, **options: Any) -> Column[Any]:
    return Column(name, String, nullable=False, **options)


def _level(name: str, *columns: Column[Any]) -> Table:
    """A level's table: `seq` orders, `name` is unique."""
    return Table(
        name,
        metadata,
        Column("seq", Integer, primary_key=True),
        _text("name", unique=True),
        *columns,
        Column("value", Text, nullable=False),
        _text("digest"),
        sqlite_autoincrement=True,
    )


def _stages() -> tuple[Column[Any], Column[Any]]:
    """How far a change that reaches beyond the database has come, and whose change it is.

    `stage`: "pending" while it is being made, "visible", "deleting" while it is removed.
    `operation`: the owner of the lease that the change is made under.
    """
    return _text("stage", index=True), _text("operation")


base_models = _level(
    "base_models",
    _text("model_name", unique=True),
    Column("path", String, nullable=True),  # None after `reindex`, until it is relocated
    Column("files", Text, nullable=False),
)
customized_models = _level(
    "customized_models",
    Column("base", String, ForeignKey("base_models.name"), nullable=False, index=True),
    _text("train_name", index=True),
    _text("training_id", unique=True),
    *_stages(),
)
complete_models = _level(
    "complete_models",
    _text("customized", index=True),
    _text("base", index=True),
    _text("train_name", index=True),
    *_stages(),
)
live_models = _level(
    "live_models",
    _text("source", index=True),
    _text("base", index=True),
    _text("train_name", index=True),
    _text("environment", index=True),
    _text("state", index=True),
    Column("artifact", String, nullable=True),  # the key of the file that it is served from
    *_stages(),
)
third_party_models = _level("third_party_models")
environments = _level("environments")

reservations = Table(
    "reservations",
    metadata,
    Column("training_id", String, primary_key=True),
    _text("name", unique=True),
    _text("base"),
    _text("train_name"),
    _text("created"),
    _text("digest"),
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
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("cancel", Integer, nullable=False),  # 1 once it was asked to stop
    Column("max_running", Integer, nullable=False),  # of its registry's jobs, while it begins
    Column("error", Text),  # `errors.to_record` as JSON
    _text("created"),
    Column("started", String),
    Column("ended", String),
    _text("digest"),
    sqlite_autoincrement=True,
)
leases = Table(
    "leases",
    metadata,
    Column("owner", String, primary_key=True),  # a job's id, a checkout's, a publication's
    Column("key", String, primary_key=True),  # what must not go away meanwhile
    _text("purpose"),
    _text("process"),  # whose it is, as JSON
    Column("renewed", Float, nullable=False),  # by that process' monotonic clock, in seconds
)
litter = Table(
    "litter",
    metadata,
    Column("key", String, primary_key=True),
    Column("seen", Float, nullable=False),  # seconds since the epoch
)
