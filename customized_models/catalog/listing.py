"""What a registry's list methods return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ..models import html_table

T = TypeVar("T")
PAGE = 100
SHOWN = 20

_COLUMNS = {
    "BaseModel": ("technical_name", "model_name", "card"),
    "CustomizedModel": ("base", "train_name", "card", "name"),
    "CompleteModel": ("base", "train_name", "card", "name"),
    "LiveModel": ("base", "train_name", "card", "name", "environment", "endpoint", "state"),
    "ThirdPartyModel": ("name", "endpoint", "api", "model", "environment", "stale"),
    "DeploymentEnvironment": ("name", "backend", "address", "port"),
}


class Listing(Generic[T], Iterator[T]):
    """An iterator over models, newest first, that fetches a page at a time.

    `page(before, count)` returns up to `count` pairs of sequence number and value, those with a
    number below `before` (if not None), in descending order. In a notebook it shows the newest
    ones as a table, without consuming them.
    """

    def __init__(
        self, kind: type[T], page: Callable[[int | None, int], list[tuple[int, T]]]
    ) -> None:
        self._kind = kind
        self._page = page
        self._before: int | None = None
        self._fetched: list[tuple[int, T]] = []

    def __iter__(self) -> Listing[T]:
        return self

    def __next__(self) -> T:
        if not self._fetched:
            self._fetched = self._page(self._before, PAGE)[::-1]
            if not self._fetched:
                raise StopIteration
        self._before, value = self._fetched.pop()
        return value

    def __repr__(self) -> str:
        return f"<{self._kind.__name__} listing, newest first>"

    def _repr_html_(self) -> str:
        columns = _COLUMNS[self._kind.__name__]
        newest: list[Any] = [value for _, value in self._page(None, SHOWN + 1)]
        table = html_table(columns, [tuple(getattr(v, c) for c in columns) for v in newest[:SHOWN]])
        return table + ("<p>and older ones</p>" if len(newest) > SHOWN else "")
