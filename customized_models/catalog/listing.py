"""What a registry's list methods return."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar, overload

from ..arguments import refused
from ..display import html_table
from ..errors import IntegrityError, InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

PAGE = 100  # rows fetched at once
SHOWN = 20  # rows of a table in a notebook

_MOST = 2**31 - 1  # rows: PostgreSQL is asked for a part of a list in numbers of 32 bits


class DamagedRowWarning(UserWarning):
    """A list leaves out a row whose digest is not that of what it says; `get` raises it."""


class Rows(Protocol[T_co]):
    """Where a listing finds what it lists."""

    def numbers(self, limit: int | None = None, offset: int = 0) -> list[int]:
        """The numbers of the rows, in the listing's order.

        Args:
            limit: At most so many, if not None.
            offset: So many of the first are left out.
        """

    def count(self) -> int:
        """How many rows there are."""

    def newest(self) -> int:
        """A number that no row has been given yet that is made from now on; rows count upwards."""

    def load(self, numbers: Sequence[int]) -> Mapping[int, T_co | IntegrityError]:
        """By number, what these rows hold; the error that it gives if one is damaged.

        Rows that have been removed meanwhile are left out.
        """


class Listing(Sequence[T], Generic[T]):
    """Models, environments or jobs, newest first: a sequence that reads rows when it is asked.

    Each use asks the registry again, so `len`, an index or another loop sees what has changed. A
    loop sees the rows that there were when it began, and fetches them a page at a time.

    A damaged row does not keep the others from being listed: a `DamagedRowWarning` names it in its
    place; its index raises `IntegrityError`.

    >>> newest = registry.customized_models()[0]               # doctest: +SKIP
    >>> registry.complete_models(base="qw2.5-7-i").to_pandas() # doctest: +SKIP

    Args:
        kind: The class of what is listed, for the message.
        columns: What a table shows of each.
        rows: Where it is.
        order: Of the rows, in words.
    """

    __slots__ = ("_columns", "_kind", "_order", "_rows")

    def __init__(
        self, kind: str, columns: tuple[str, ...], rows: Rows[T], order: str = "newest first"
    ) -> None:
        self._kind = kind
        self._columns = columns
        self._rows = rows
        self._order = order

    def __len__(self) -> int:
        return self._rows.count()

    def __bool__(self) -> bool:
        return bool(self._rows.numbers(1))

    def __iter__(self) -> Iterator[T]:
        return self._values(self._numbers())

    def _numbers(self) -> Iterator[int]:
        """The first page at once; all others, of what there was then, once they are asked for."""
        newest, page = self._rows.newest(), self._rows.numbers(PAGE)
        yield from page
        if len(page) == PAGE:
            seen = set(page)
            yield from (n for n in self._rows.numbers() if n <= newest and n not in seen)

    def __reversed__(self) -> Iterator[T]:
        return self._values(self._rows.numbers()[::-1])

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return list(self._values(self._part(index)))
        if not hasattr(index, "__index__"):
            raise refused("the index of a listing", index, "a whole number or a slice")
        if (place := operator.index(index)) < 0:
            place += len(self)
        is_place = 0 <= place <= _MOST
        number = next(iter(self._rows.numbers(1, place) if is_place else ()), None)
        if number is None:
            raise IndexError("listing index out of range")
        value = self._rows.load([number]).get(number)
        if value is None:
            raise IndexError("the row was removed while it was read")
        if isinstance(value, IntegrityError):
            raise value
        return value

    def _part(self, part: slice) -> list[int]:
        """The numbers in a slice; one that counts from the front is read as a page."""
        start, stop, step = part.start or 0, part.stop, part.step or 1
        if start < 0 or step < 0 or (stop is not None and stop < 0):
            return self._rows.numbers()[part]
        start, end, step = part.indices(_MOST)
        count = None if stop is None else max(0, end - start)
        return self._rows.numbers(count, start)[::step]

    def first(self) -> T | None:
        """The first one; None if there is none."""
        return next(self._values(self._rows.numbers(1)), None)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each, a column for each field; fields within fields are joined by dots.

        `card.evaluation.metrics.eval_loss` is one, so that a sweep can be sorted by it. Times are
        in UTC.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("pandas is not installed: pip install pandas") from error
        values: list[Any] = list(self)
        table = pandas.json_normalize([value.to_dict() for value in values])
        for column in {"created", "started", "ended"}.intersection(table.columns):
            table[column] = pandas.to_datetime(table[column], utc=True)
        return table

    def keys(self) -> NoReturn:
        """A listing is no mapping; without this, `dict(listing)` would be empty if it is empty."""
        raise InvalidArgumentError(
            f"a listing is a sequence, not a mapping: use list(listing), and in a web service "
            f"return that, or annotate the function as -> list[{self._kind}]"
        )

    def __repr__(self) -> str:
        count = len(self)
        return f"<{count} {self._kind}{'' if count == 1 else 's'}, {self._order}>"

    def _repr_html_(self) -> str:
        numbers = self._rows.numbers(SHOWN)
        found = self._rows.load(numbers)
        newest = [v for n in numbers if (v := found.get(n)) and not isinstance(v, IntegrityError)]
        table = html_table(
            self._columns, [tuple(getattr(v, c) for c in self._columns) for v in newest]
        )
        more = len(self) - SHOWN
        return table + (f"<p>and {more} more</p>" if more > 0 else "")

    def _values(self, numbers: Iterable[int]) -> Iterator[T]:
        left = iter(numbers)
        while page := list(islice(left, PAGE)):
            found = self._rows.load(page)
            for number in page:
                value = found.get(number)
                if isinstance(value, IntegrityError):
                    warnings.warn(str(value), DamagedRowWarning, stacklevel=3)
                elif value is not None:
                    yield value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """For web services: `-> Listing[CustomizedModel]` answers with a list."""
        from pydantic_core import core_schema

        (item,) = getattr(source, "__args__", (Any,))
        items = core_schema.list_schema(handler.generate_schema(item))
        return core_schema.no_info_before_validator_function(_as_list, items)


def _as_list(given: object) -> object:
    return list(given) if isinstance(given, Listing) else given
