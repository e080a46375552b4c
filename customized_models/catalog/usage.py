"""Sizes and dependents, asked of the rows alone."""

from __future__ import annotations

from typing import Any

from attrs import frozen
from sqlalchemy import Connection, func, select

from ..models import BaseModel, CompleteModel, CustomizedModel, LiveModel
from .rows import TABLES, names
from .schema import complete_models, customized_models


@frozen
class Sizes:
    """Bytes of the visible models of a registry; see `usage.Usage`."""

    customized: int
    complete: int
    evicted: int
    reclaimable: int


def sizes(connection: Connection) -> Sizes:
    """The bytes of all models by what they are."""

    def total(table: Any, *conditions: Any) -> int:
        visible = (table.c.stage == "visible", *conditions)
        found = connection.execute(select(func.sum(table.c.size)).where(*visible)).scalar()
        return int(found or 0)

    here = complete_models.c.evicted == 0
    with_parent = complete_models.c.customized.in_(select(customized_models.c.name))
    return Sizes(
        customized=total(customized_models),
        complete=total(complete_models, here),
        evicted=total(complete_models, complete_models.c.evicted == 1),
        reclaimable=total(complete_models, here, with_parent),
    )


def size_of(connection: Connection, value: Any) -> int:
    """The bytes that are stored of a value."""
    table = TABLES[type(value)]
    if "size" not in table.c or getattr(value, "evicted", False):
        return 0
    return connection.execute(select(table.c.size).where(table.c.name == value.name)).scalar() or 0


def made_of(connection: Connection, value: Any) -> list[str]:
    """The names of what was made of a value, or is kept of it."""
    children: dict[type[Any], tuple[tuple[type[Any], str], ...]] = {
        BaseModel: ((CustomizedModel, "base"),),
        CustomizedModel: ((CompleteModel, "customized"), (LiveModel, "source")),
        CompleteModel: ((LiveModel, "source"),),
    }
    return [
        name
        for kind, column in children.get(type(value), ())
        for name in names(connection, TABLES[kind], **{column: value.name})
    ]
