"""Values as rows, and rows as values; each row has a digest of all that it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from difflib import get_close_matches
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, delete, insert, select, update

from ..errors import CustomizedModelsError, IntegrityError, NotFoundError, shown
from ..files.digests import canonical_json, digest_of
from ..files.documents import from_document, to_document
from ..history import Action
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    LiveModel,
    ThirdPartyModel,
)
from . import schema
from .events import record_changed, record_created
from .metrics import forget_metrics, index_metrics

T = TypeVar("T")

TABLES: Mapping[type[Any], Table] = {
    BaseModel: schema.base_models,
    CustomizedModel: schema.customized_models,
    CompleteModel: schema.complete_models,
    LiveModel: schema.live_models,
    ThirdPartyModel: schema.third_party_models,
    DeploymentEnvironment: schema.environments,
}
"""Where the values of each class are kept."""


def add_row(connection: Connection, table: Table, **values: Any) -> None:
    """Insert a row, with its digest if the table has one.

    Raises:
        AlreadyExistsError: A unique column has that value already.
    """
    if "digest" in table.columns:
        values["digest"] = _digest(table, values)
    connection.execute(insert(table).values(**values))


def find_row(connection: Connection, table: Table, **equals: Any) -> Any | None:
    """The one row in which the columns have these values, or None."""
    query = select(table).where(*(table.c[key] == value for key, value in equals.items()))
    return connection.execute(query).mappings().one_or_none()


def change_row(connection: Connection, table: Table, name: str, **values: Any) -> None:
    """Set columns of the row with that name.

    Raises:
        IntegrityError: The row is damaged, so that its other columns are not to be relied on.
    """
    if "digest" in table.columns:
        row = find_row(connection, table, name=name)
        if row is None:
            return
        values["digest"] = _digest(table, {**checked_row(table, row), **values})
    connection.execute(update(table).where(table.c.name == name).values(**values))


def remove_row(connection: Connection, table: Table, name: str) -> None:
    """Delete the row with that name, if there is one."""
    forget_metrics(connection, table, name)
    connection.execute(delete(table).where(table.c.name == name))


def names(connection: Connection, table: Table, **equals: Any) -> list[str]:
    """The names of the rows in which the columns have these values."""
    query = select(table.c.name).where(*(table.c[key] == value for key, value in equals.items()))
    return list(connection.execute(query).scalars())


def checked_row(table: Table, row: Any) -> Any:
    """`row`, if its digest is that of its columns.

    Raises:
        IntegrityError: It is not.
    """
    if row["digest"] != _digest(table, row):
        raise IntegrityError(
            f"the row of {shown(row['name'])} in {table.name} is damaged: its digest differs; "
            f"ModelRegistry.reindex() makes rows of stored models again"
        )
    return row


def _digest(table: Table, values: Mapping[str, Any]) -> str:
    columns = [c.name for c in table.columns if c.name not in ("seq", "digest")]
    try:
        return digest_of({"table": table.name, **{name: values.get(name) for name in columns}})
    except (TypeError, ValueError) as error:  # bytes or half a character where text belongs
        raise IntegrityError(f"a row in {table.name} is damaged: {shown(error)}") from error


def as_text(value: Any) -> str:
    """An attrs value as it stands in a `value` column."""
    return canonical_json(to_document(value)).decode()


def value_of(kind: type[T], row: Any) -> T:
    """The value in a row: `value_of(type(v), row) == v` for the row that `insert_value(v)` made.

    Raises:
        IntegrityError: The row is damaged.
    """
    checked_row(TABLES[kind], row)
    try:
        return from_document(kind, json.loads(row["value"]))
    except (CustomizedModelsError, ValueError, RecursionError) as error:
        raise IntegrityError(
            f"the row of {shown(row['name'])} in {TABLES[kind].name} holds no {kind.__name__} "
            f"that this version reads: {shown(error)}"
        ) from error


def required(connection: Connection, kind: type[Any], name: str) -> Any:
    """The row of that class and name.

    Raises:
        NotFoundError: There is none.
    """
    row = find_row(connection, TABLES[kind], name=name)
    if row is None:
        newest = select(TABLES[kind].c.name).order_by(TABLES[kind].c.seq.desc()).limit(_LOOKED_AT)
        near = get_close_matches(name, connection.execute(newest).scalars(), 1)
        hint = f"; did you mean {shown(near[0])}?" if near else ""
        raise NotFoundError(f"no {kind.__name__} is named {shown(name)}{hint}")
    return row


_LOOKED_AT = 1000  # names among which one that is nearly the same is looked for


def differences(known: Any, new: Any) -> str:
    """What differs between two values of one class, field by field, old and new."""
    return " and ".join(
        f"another {name}: {shown(known[name])}, not {shown(new[name])}"
        for name in known.keys()  # noqa: SIM118 -- a value, which is no mapping
        if known[name] != new[name]
    )


VISIBLE = "visible"
"""The stage of a row that everyone sees."""


def insert_value(
    connection: Connection, value: Any, *, action: Action = "created", **columns: Any
) -> None:
    """Add a value's row; columns that bear a field's name are filled from it.

    Args:
        connection: Of the transaction.
        value: What the row holds.
        action: What the event log says of it, once it is visible.
        columns: Further columns.

    Raises:
        AlreadyExistsError: A unique column has that value already.
    """
    table = TABLES[type(value)]
    for column in table.columns.keys() - columns.keys() - {"seq", "name", "value", "digest"}:
        if hasattr(value, column):
            columns[column] = _as_column(getattr(value, column))
    add_row(connection, table, name=value.name, value=as_text(value), **columns)
    if columns.get("stage", VISIBLE) == VISIBLE:
        index_metrics(connection, table, value)
        record_created(connection, action, value)


def _as_column(field: Any) -> Any:
    """A field as the column of its name has it."""
    if isinstance(field, datetime):
        return field.timestamp()
    return int(field) if isinstance(field, bool) else str(field)


def update_value(
    connection: Connection, value: Any, *, action: Action = "changed", **columns: Any
) -> None:
    """Put a changed value in place of the one of its name.

    Args:
        connection: Of the transaction.
        value: What the row holds from now on.
        action: What the event log says of it, if the row was visible before.
        columns: Further columns that change.
    """
    table = TABLES[type(value)]
    row = find_row(connection, table, name=value.name)
    if row is None:
        return
    stage = row.get("stage", VISIBLE)
    change_row(connection, table, value.name, value=as_text(value), **columns)
    if columns.get("stage", stage) == VISIBLE:
        index_metrics(connection, table, value)
    if stage == VISIBLE:
        record_changed(connection, action, value_of(type(value), row), value)
    elif columns.get("stage") == VISIBLE:
        record_created(connection, "created", value)
