"""Which model an alias of a training stands for now."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, select

from ..errors import InUseError, NotFoundError, listed, shown
from ..labels import Reference
from .events import record
from .rows import TABLES
from .schema import aliases, descriptions, tags


def find_alias(connection: Connection, kind: type[Any], reference: Reference) -> Any | None:
    """The row of an alias of a class, or None."""
    query = select(aliases).where(
        aliases.c.level == TABLES[kind].name,
        aliases.c.train_name == reference.train_name,
        aliases.c.alias == reference.alias,
    )
    return connection.execute(query).mappings().one_or_none()


def name_meant(connection: Connection, kind: type[Any], name: str) -> str:
    """The name itself, or that of the model which an alias stands for.

    Raises:
        NotFoundError: No model of the class has that alias.
    """
    reference = Reference.parse(name)
    if reference is None:
        return name
    row = find_alias(connection, kind, reference)
    if row is None:
        raise NotFoundError(
            f"no {kind.__name__} of training {shown(reference.train_name)} has the alias "
            f"{shown(reference.alias)}; ModelRegistry.set_alias gives it"
        )
    meant: str = row["name"]
    return meant


def aliases_of(connection: Connection, kind: type[Any], name: str) -> list[Any]:
    """The rows of a model's aliases."""
    query = select(aliases).where(aliases.c.level == TABLES[kind].name, aliases.c.name == name)
    return list(connection.execute(query.order_by(aliases.c.alias)).mappings())


def reference_of(row: Any) -> str:
    """An alias's row as it is written."""
    return str(Reference(row["alias"], row["train_name"]))


def refuse_if_protected(connection: Connection, value: Any) -> None:
    """Refuse to delete a model that has a protected alias.

    Raises:
        InUseError: It has one.
    """
    held = aliases_of(connection, type(value), value.name)
    if protected := [reference_of(row) for row in held if row["protected"]]:
        raise InUseError(
            f"{value.name} is {listed(protected)}, which is protected; give the alias to another "
            f"model first, or remove it"
        )


def forget_labels(connection: Connection, value: Any) -> None:
    """Remove tags, aliases and description of what is deleted."""
    kind: Any = type(value)
    for row in aliases_of(connection, kind, value.name):
        remove_alias(connection, kind, row)
    for table in (tags, descriptions):
        mine = (table.c.level == TABLES[kind].name, table.c.name == value.name)
        connection.execute(delete(table).where(*mine))


def remove_alias(connection: Connection, kind: type[Any], row: Any) -> None:
    """Let an alias stand for nothing."""
    connection.execute(
        delete(aliases).where(
            aliases.c.level == row["level"],
            aliases.c.train_name == row["train_name"],
            aliases.c.alias == row["alias"],
        )
    )
    reference = reference_of(row)
    record(connection, "alias removed", kind, row["name"], {"alias": reference}, {}, [reference])
