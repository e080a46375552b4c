"""Searches in SQL: which rows of a class fulfil conditions, in which order, a page at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from attrs import evolve, frozen
from sqlalchemy import ColumnElement, Select, Table, and_, func, not_, or_, select

from ..errors import IntegrityError, InvalidArgumentError
from ..search import (
    Condition,
    Inverted,
    Joined,
    Key,
    OnColumn,
    OnMetric,
    Operator,
    Tagged,
    is_pattern,
)
from .database import Database
from .patterns import fits
from .rows import TABLES, value_of
from .schema import metrics, tags

T = TypeVar("T", bound=Any)

BEING_CHANGED = ("pending", "deleting")
"""The stages of rows that are not shown. Any other is, so that a damaged row is seen."""


@frozen
class ModelRows(Generic[T]):
    """The visible rows of a class that fulfil all conditions, in an order; see `listing.Rows`.

    Without an order, and where the order leaves it open, the newest row comes first.
    """

    database: Database
    kind: type[T]
    conditions: tuple[Condition, ...] = ()
    order: tuple[Key, ...] = ()

    def where(self, conditions: tuple[Condition, ...]) -> ModelRows[T]:
        """Those of these rows that fulfil further conditions."""
        return evolve(self, conditions=(*self.conditions, *conditions))

    def order_by(self, keys: tuple[Key, ...]) -> ModelRows[T]:
        """These rows in another order.

        Raises:
            InvalidArgumentError: Values of the class have no such field.
        """
        for key in keys:
            if not key.is_metric and key.name not in self._table.c:
                raise InvalidArgumentError(
                    f"order_by: a {self.kind.__name__} has no {key.name} to be ordered by"
                )
        return evolve(self, order=keys)

    def numbers(self, limit: int | None = None, offset: int = 0) -> list[int]:
        """See `listing.Rows`. Rows without the metric that they are ordered by come last."""
        if not self.order or not self.order[0].is_metric:
            found = select(self._table.c.seq).where(*self._clauses(self._is_common))
            return self._page(self._ordered(found, self.order), limit, offset)
        measured, others = self._by_metric(self.order[0])
        page = self._page(measured, limit, offset)
        if limit is not None and len(page) == limit:
            return page
        before = offset + len(page) if page or not offset else self._count(measured)
        left = None if limit is None else limit - len(page)
        return page + self._page(others, left, max(0, offset - before))

    def count(self) -> int:
        """See `listing.Rows`."""
        return self._count(self._found)

    def newest(self) -> int:
        """See `listing.Rows`."""
        (row,) = self.database.rows(select(func.max(self._table.c.seq).label("newest")))
        return row["newest"] or 0

    def load(self, numbers: Sequence[int]) -> Mapping[int, T | IntegrityError]:
        """See `listing.Rows`."""
        rows = self.database.rows(select(self._table).where(self._table.c.seq.in_(numbers)))
        return {row["seq"]: value_or_error(self.kind, row) for row in rows}

    def measured(self, metric: str) -> list[tuple[str, float]]:
        """See `model_listing.SearchableRows`."""
        table, every = self._table, self.numbers()
        query = select(table.c.seq, table.c.name, metrics.c.value).join(
            metrics,
            and_(
                metrics.c.level == table.name,
                metrics.c.name == metric,
                metrics.c.seq == table.c.seq,
            ),
        )
        found = {row["seq"]: (row["name"], row["value"]) for row in self.database.rows(query)}
        return [found[number] for number in every if number in found]

    @property
    def _table(self) -> Table:
        return TABLES[self.kind]

    @property
    def _found(self) -> Select[Any]:
        """The numbers of the rows, in no order."""
        return select(self._table.c.seq).where(*self._clauses(lambda condition: False))

    def _clauses(self, is_common: IsCommon) -> list[ColumnElement[bool]]:
        table = self._table
        clauses = [_clause(table, one, is_common) for one in self.conditions]
        visible = [table.c.stage.not_in(BEING_CHANGED)] if "stage" in table.c else []
        return [*clauses, *visible]

    def _is_common(self, condition: OnMetric) -> bool:
        """Whether so many rows fulfil it that a page is full after a look at some of them."""
        having = _having(self._table, condition, metrics)
        return bool(self._page(having, 1, _COMMON - 1))

    def _by_metric(self, key: Key) -> tuple[Select[Any], Select[Any]]:
        """The rows that have a metric, in its order, and those that do not have it.

        Two queries, because each can then be read from an index and end with its page. Only visible
        rows have metrics, so that without a condition the first needs no other table.
        """
        table = self._table
        having = (metrics.c.level == table.name, metrics.c.name == key.name)
        value = metrics.c.value.desc() if key.descending else metrics.c.value
        measured, rest = select(metrics.c.seq).where(*having).order_by(value), self.order[1:]
        if rest:
            measured = measured.join(table, table.c.seq == metrics.c.seq)
        if all(map(_is_of_metrics, self.conditions)):
            asked = (_clause(table, c, self._is_common, metrics.c.seq) for c in self.conditions)
            measured = measured.where(*asked)
        else:
            measured = measured.where(metrics.c.seq.in_(self._found))
        others = self._found.where(table.c.seq.not_in(select(metrics.c.seq).where(*having)))
        return self._ordered(measured, rest, metrics), self._ordered(others, rest)

    def _ordered(
        self, query: Select[Any], keys: Sequence[Key], numbered: Table | None = None
    ) -> Select[Any]:
        """The query in an order; `numbered` has the numbers, if the level's own table does not."""
        table = self._table
        for key in keys:
            column: ColumnElement[Any] = (
                _metric_of(table, key) if key.is_metric else table.c[key.name]
            )
            query = query.order_by((column.desc() if key.descending else column).nulls_last())
        return query.order_by((table if numbered is None else numbered).c.seq.desc())

    def _page(self, query: Select[Any], limit: int | None, offset: int) -> list[int]:
        with self.database.read() as connection:
            return list(connection.execute(query.limit(limit).offset(offset or None)).scalars())

    def _count(self, query: Select[Any]) -> int:
        with self.database.read() as connection:
            counted = select(func.count()).select_from(query.order_by(None).subquery())
            return connection.execute(counted).scalar_one()


def value_or_error(kind: type[T], row: Any) -> T | IntegrityError:
    """What a row holds, or the error that it gives if it is damaged."""
    try:
        return value_of(kind, row)
    except IntegrityError as error:
        return error


def _metric_of(table: Table, key: Key) -> Any:
    """A metric of a row, beside the one that the rows may be read by."""
    other = metrics.alias()
    mine = (
        other.c.level == table.name,
        other.c.name == key.name,
        other.c.seq == table.c.seq,
    )
    return select(other.c.value).where(*mine).correlate(table).scalar_subquery()


IsCommon: TypeAlias = Callable[[OnMetric], bool]

_COMMON = 2000  # rows: where more fulfil a condition, each row is asked, else they are collected


def _having(table: Table, condition: OnMetric, among: Any) -> Select[Any]:
    """The numbers of the rows of a level that fulfil a condition, by the table of metrics."""
    compare = _OPERATORS[condition.operator]
    return select(among.c.seq).where(
        among.c.level == table.name,
        among.c.name == condition.name,
        compare(among.c.value, condition.value),
    )


def _is_of_metrics(condition: Condition) -> bool:
    """Whether the table of metrics alone tells which rows fulfil a condition."""
    match condition:
        case Joined():
            return all(map(_is_of_metrics, condition.conditions))
        case Inverted():
            return _is_of_metrics(condition.condition)
    return isinstance(condition, OnMetric)


def _clause(
    table: Table, condition: Condition, is_common: IsCommon, seq: Any = None
) -> ColumnElement[bool]:
    """A condition in SQL; `seq` has the rows' numbers, if the level's own table does not."""
    seq = table.c.seq if seq is None else seq
    match condition:
        case OnColumn():
            compare = _OPERATORS[condition.operator]
            return compare(table.c[condition.column], condition.value)
        case OnMetric():
            among = metrics.alias()
            having = _having(table, condition, among)
            if not is_common(condition):
                found: ColumnElement[bool] = seq.in_(having)
                return found
            return having.where(among.c.seq == seq).correlate(seq.table).exists()
        case Tagged():
            having = select(tags.c.name).where(
                tags.c.level == table.name, _glob(tags.c.tag, condition.pattern)
            )
            return table.c.name.in_(having)
        case Joined():
            join = and_ if condition.operator == "and" else or_
            return join(*(_clause(table, one, is_common, seq) for one in condition.conditions))
        case Inverted():
            return not_(_clause(table, condition.condition, is_common, seq))
    raise NotImplementedError(f"no clause for {condition}")


def _glob(column: Any, pattern: str) -> ColumnElement[bool]:
    """A text without `*` and `?` is found by equality, which is faster."""
    if not is_pattern(pattern):
        return column == pattern  # type: ignore[no-any-return]  # columns are not typed
    return fits(column, pattern)


_OPERATORS: Mapping[Operator, Callable[[Any, Any], ColumnElement[bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
    "glob": _glob,
}
