"""What deleting would do, and what the bytes are spent on, asked of the rows alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select

from ..errors import InUseError
from ..models import BaseModel, CompleteModel, CustomizedModel, LiveModel
from ..usage import DeletionPlan, Usage
from .database import Database
from .levels import Levels
from .rows import TABLES, names
from .schema import base_models, complete_models, customized_models


class UsageRows:
    """Sizes and dependents."""

    def __init__(self, database: Database, levels: Levels) -> None:
        self._database = database
        self._levels = levels

    def plan_deletion(self, value: Any) -> DeletionPlan:
        """See `ModelRegistry.plan_deletion`."""
        with self._database.read() as connection:
            refused = ""
            try:
                self._levels.refuse_to_delete(connection, value)
            except InUseError as error:
                refused = str(error)
            return DeletionPlan(
                kind=type(value).__name__,
                name=value.name,
                refused=refused,
                dependents=tuple(_made_of(connection, value)),
                freed=_size_of(connection, value),
            )

    def sizes(self, cached: int) -> Usage:
        """See `ModelRegistry.usage`; of `cached` bytes there are no rows."""
        here = complete_models.c.evicted == 0
        placed = select(base_models.c.name).where(base_models.c.path.is_not(None))
        with_parents = (
            complete_models.c.customized.in_(select(customized_models.c.name)),
            complete_models.c.base.in_(placed),
        )
        with self._database.read() as connection:
            return Usage(
                customized=_total(connection, customized_models),
                complete=_total(connection, complete_models, here),
                cached=cached,
                evicted=_total(connection, complete_models, complete_models.c.evicted == 1),
                reclaimable=_total(connection, complete_models, here, *with_parents),
            )


def _total(connection: Connection, table: Any, *conditions: Any) -> int:
    """Bytes of the visible models that fulfil all conditions."""
    query = select(func.sum(table.c.size)).where(table.c.stage == "visible", *conditions)
    return int(connection.execute(query).scalar() or 0)


def _size_of(connection: Connection, value: Any) -> int:
    """The bytes that are stored of a value."""
    table = TABLES[type(value)]
    if "size" not in table.c or getattr(value, "evicted", False):
        return 0
    return connection.execute(select(table.c.size).where(table.c.name == value.name)).scalar() or 0


def _made_of(connection: Connection, value: Any) -> list[str]:
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
