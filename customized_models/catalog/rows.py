"""The library's values as database rows. Imported only when a registry is first used."""

from __future__ import annotations

import functools
import json
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, select

from ..base_models import Location
from ..errors import NotFoundError, shown
from ..files.manifest import canonical_json, from_document, to_document
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    LiveModel,
    ThirdPartyModel,
)
from . import database as db
from .listing import Listing

T = TypeVar("T")

TABLES: dict[type[Any], Table] = {
    BaseModel: db.base_models,
    CustomizedModel: db.customized_models,
    CompleteModel: db.complete_models,
    LiveModel: db.live_models,
    ThirdPartyModel: db.third_party_models,
    DeploymentEnvironment: db.environments,
}


def as_text(value: Any) -> str:
    """An attrs value as it stands in a `value` column."""
    return canonical_json(to_document(value)).decode()


def value_of(kind: type[T], row: Any) -> T:
    """The value in a row: `value_of(type(v), row) == v` for the row that `insert(v)` made."""
    return from_document(kind, json.loads(row["value"]))


def required(connection: Connection, kind: type[Any], name: str, *, deleting: bool = False) -> Any:
    """The row of that class and name; rows being deleted count only if `deleting`.

    Raises:
        NotFoundError: there is none.
    """
    row = db.find(connection, TABLES[kind], name=name)
    if row is None or (row.get("deleting") and not deleting):
        raise NotFoundError(f"no {kind.__name__} is named {shown(name)}")
    return row


def insert(connection: Connection, value: Any, **columns: Any) -> None:
    """Add a value's row; columns that bear a field's name are filled from it.

    Raises:
        AlreadyExistsError: a unique column has that value already.
    """
    table = TABLES[type(value)]
    for column in table.columns.keys() - columns.keys() - {"seq", "name", "value"}:
        if hasattr(value, column):
            columns[column] = str(getattr(value, column))
    db.add(connection, table, name=value.name, value=as_text(value), **columns)


def update(connection: Connection, value: Any, **columns: Any) -> None:
    """Put a changed value in place of the one of its name."""
    db.change(connection, TABLES[type(value)], value.name, value=as_text(value), **columns)


def listing(database: db.Database, kind: type[T], **equals: Any) -> Listing[T]:
    """The values whose columns equal those that are not None, newest first."""
    given = {key: value for key, value in equals.items() if value is not None}
    return Listing(kind, functools.partial(_page, database, kind, given))


def _page(
    database: db.Database, kind: type[T], equals: dict[str, Any], before: int | None, count: int
) -> list[tuple[int, T]]:
    table = TABLES[kind]
    query = select(table).where(*(table.c[key] == value for key, value in equals.items()))
    if before is not None:
        query = query.where(table.c.seq < before)
    rows = database.rows(query.order_by(table.c.seq.desc()).limit(count))
    return [(row["seq"], value_of(kind, row)) for row in rows]


def location_columns(location: Location) -> dict[str, str]:
    """A base model's location as its row has it."""
    return {"path": location.path, "files": canonical_json(to_document(location.files)).decode()}


def location_of(row: Any) -> Location:
    """Law: `location_of` of a row with `location_columns(l)` equals `l`."""
    return from_document(Location, {"path": row["path"], "files": json.loads(row["files"])})
