"""All rows of a registry, copied into the empty database of another.

They are copied in one transaction, with their numbers: lists have the same order, and whoever
follows the events goes on where they were. Leases, and what `gc` has seen, are of the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from attrs import frozen
from sqlalchemy import Connection, Table, insert, select

from ..errors import AlreadyExistsError, IntegrityError, InUseError, listed
from ..models import CompleteModel, CustomizedModel
from .leases import COPY_KEY
from .rows import TABLES, checked_row, value_of
from .schema import leases, litter, live_models, metadata

if TYPE_CHECKING:
    from .catalog import Catalog
    from .leases import Lease

_COPIED = tuple(table for table in metadata.sorted_tables if table not in (leases, litter))
_STAGED = tuple(table for table in _COPIED if "stage" in table.c)
_PAGE = 1000  # rows: some hundred kilobytes


@frozen
class Parcel:
    """What is stored under a key, as the rows tell.

    Attributes:
        key: Where it is stored.
        name: Of the model that it is, or that is served from it.
        model: The model; None if it is a file that one is served from.
        size: Bytes of the model's content files, if they are there.
    """

    key: str
    name: str
    model: CustomizedModel | CompleteModel | None
    size: int

    @property
    def is_recipe(self) -> bool:
        """Whether it is all that there is of an evicted model: its manifest and card."""
        return isinstance(self.model, CompleteModel) and self.key == self.model.recipe_key


def begin_copy(source: Catalog, target: Catalog, lease: Lease) -> bool:
    """Hold the database `target` for a copy; False if it has all rows of `source` already.

    Raises:
        AlreadyExistsError: It has others.
        InUseError: Another process copies into it.
    """
    with source.database.read() as reading, target.database.write() as writing:
        target.leases.refuse_during_copy(writing)
        lease.take(writing, [COPY_KEY], "a copy of another registry into this one")
        return _is_empty(reading, writing)


def copy_rows(
    source: Catalog, target: Catalog, lease: Lease, here: Mapping[str, Parcel]
) -> list[Parcel]:
    """Copy all rows, unless they tell of bytes that were not copied.

    Args:
        source: Where they are.
        target: Where they are to be.
        lease: Of `begin_copy`.
        here: What was copied, by its key.

    Returns:
        What is to be copied before. If there is nothing, all rows are there.

    Raises:
        InUseError: Something is under way in `source`.
        IntegrityError: A row is damaged.
        AlreadyExistsError: Others have written to `target` meanwhile.
    """
    with source.database.read() as reading:
        _refuse_unfinished(source, reading)
        missing = [parcel for parcel in _parcels(reading) if here.get(parcel.key) != parcel]
        if missing:
            return missing
        with target.database.write() as writing:
            lease.check(writing)
            if _is_empty(reading, writing):
                for table in _COPIED:
                    for page in _pages(reading, table):
                        writing.execute(insert(table), page)
                target.database.continue_numbers(writing)
                if differing := _differing(reading, writing):
                    raise IntegrityError(f"the rows of {listed(differing)} are not as copied")
            lease.end(writing)
    return []


def _refuse_unfinished(source: Catalog, connection: Connection) -> None:
    jobs = [f"{row['kind']} of {row['name']}" for row in source.jobs.under_way(connection)]
    if jobs:
        raise InUseError(
            f"jobs are under way: {listed(jobs)}; copy once they have ended, or cancel them"
        )
    for table in _STAGED:
        query = select(table.c.name).where(table.c.stage.in_(("pending", "deleting")))
        if found := list(connection.execute(query).scalars()):
            raise InUseError(
                f"{listed(found)} is being made or deleted; copy after that, or, if the process "
                f"about it is gone, after ModelRegistry.recover()"
            )


def _parcels(connection: Connection) -> Iterator[Parcel]:
    """All that is stored, each key once."""
    for kind in (CustomizedModel, CompleteModel):
        for row in _rows(connection, TABLES[kind]):
            model: Any = value_of(kind, row)
            if getattr(model, "evicted", False):
                yield Parcel(model.recipe_key, model.name, model, 0)
            else:
                yield Parcel(model.key, model.name, model, row["size"] or 0)
    served = {
        row["artifact"]: row["name"]
        for row in _rows(connection, live_models)
        if row["artifact"] is not None and row["state"] != "undeployed"
    }
    for key, name in served.items():
        yield Parcel(key, name, None, 0)


def _is_empty(source: Connection, target: Connection) -> bool:
    """Whether `target` has no rows; False if it has those of `source`.

    Raises:
        AlreadyExistsError: It has others.
    """
    filled = [t.name for t in _COPIED if target.execute(select(t).limit(1)).first() is not None]
    if filled and _differing(source, target):
        raise AlreadyExistsError(
            f"the registry to copy to has rows of its own in {listed(filled)}; copy to an empty "
            f"directory, storage and database"
        )
    return not filled


def _differing(one: Connection, other: Connection) -> list[str]:
    """The tables whose rows differ in anything. Neither transaction is idle for long."""
    return [
        table.name
        for table in _COPIED
        if any(a != b for a, b in zip_longest(_pages(one, table), _pages(other, table)))
    ]


def _rows(connection: Connection, table: Table) -> Iterator[Mapping[str, Any]]:
    return (row for page in _pages(connection, table) for row in page)


def _pages(connection: Connection, table: Table) -> Iterator[list[Mapping[str, Any]]]:
    """All rows, in the order of their keys.

    Raises:
        IntegrityError: One is damaged.
    """
    query = select(table).order_by(*table.primary_key.columns)
    result = connection.execute(query.execution_options(yield_per=_PAGE)).mappings()
    for page in result.partitions():
        if "digest" in table.c:
            for row in page:
                checked_row(table, row)
        yield [dict(row) for row in page]
