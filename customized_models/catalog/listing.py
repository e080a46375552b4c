"""What a registry's list methods return."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ..display import html_table
from ..errors import IntegrityError

T = TypeVar("T")
PAGE = 100  # rows fetched at once
SHOWN = 20  # rows of a table in a notebook

_COLUMNS = {
    "BaseModel": ("technical_name", "model_name", "card"),
    "CustomizedModel": ("base", "train_name", "card", "name"),
    "CompleteModel": ("base", "train_name", "card", "name"),
    "LiveModel": ("base", "train_name", "card", "name", "environment", "endpoint", "state"),
    "ThirdPartyModel": ("name", "endpoint", "api", "model", "environment", "stale"),
    "DeploymentEnvironment": ("name", "backend", "address", "port"),
}


class DamagedRowWarning(UserWarning):
    """A list leaves out a row whose digest is not that of what it says; `get` raises it."""


class Listing(Generic[T], Iterator[T]):
    """An iterator over models, newest first, that fetches a page at a time.

    In a notebook it shows the newest ones as a table, without consuming them. A damaged row does
    not keep the others from being listed: a `DamagedRowWarning` names it in its place.

    Args:
        kind: The class of what is listed.
        page: `page(before, count)` returns up to `count` pairs of sequence number and value, or
            the error that its row gives, those with a number below `before` (if not None), in
            descending order.
    """

    def __init__(
        self,
        kind: type[T],
        page: Callable[[int | None, int], list[tuple[int, T | IntegrityError]]],
    ) -> None:
        self._kind = kind
        self._page = page
        self._before: int | None = None
        self._fetched: list[tuple[int, T | IntegrityError]] = []

    def __iter__(self) -> Listing[T]:
        return self

    def __next__(self) -> T:
        while True:
            if not self._fetched:
                self._fetched = self._page(self._before, PAGE)[::-1]
                if not self._fetched:
                    raise StopIteration
            self._before, value = self._fetched.pop()
            if not isinstance(value, IntegrityError):
                return value
            warnings.warn(str(value), DamagedRowWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<{self._kind.__name__} listing, newest first>"

    def _repr_html_(self) -> str:
        columns = _COLUMNS[self._kind.__name__]
        fetched = [value for _, value in self._page(None, SHOWN + 1)]
        newest: list[Any] = [v for v in fetched if not isinstance(v, IntegrityError)]
        table = html_table(columns, [tuple(getattr(v, c) for c in columns) for v in newest[:SHOWN]])
        return table + ("<p>and older ones</p>" if len(newest) > SHOWN else "")
