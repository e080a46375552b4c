"""What a registry's lists of models return: a listing that can be narrowed, ordered and plotted."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from ..search import Condition, Key, Order, conditions_of
from .listing import Listing, Rows

T = TypeVar("T")


class SearchableRows(Rows[T], Protocol[T]):
    """Where a listing of models finds them."""

    def where(self, conditions: tuple[Condition, ...]) -> SearchableRows[T]:
        """Those that fulfil all of these conditions as well."""

    def order_by(self, keys: tuple[Key, ...]) -> SearchableRows[T]:
        """The same in another order."""


class ModelListing(Listing[T], Generic[T]):
    """A `Listing` of models. `where` and `order_by` give another one, and change nothing here.

    >>> good = registry.customized_models().where(metric("eval_loss") < 1.2)  # doctest: +SKIP
    >>> good.order_by(metric("eval_loss"))[:10]                               # doctest: +SKIP
    """

    __slots__ = ("_searchable",)

    def __init__(
        self,
        kind: str,
        columns: tuple[str, ...],
        rows: SearchableRows[T],
        order: str = "newest first",
    ) -> None:
        super().__init__(kind, columns, rows, order)
        self._searchable = rows

    def where(self, *conditions: Condition) -> ModelListing[T]:
        """Those of these models that fulfil every condition.

        Raises:
            InvalidArgumentError: It is no condition, such as `metric` and `tag` make.
        """
        rows = self._searchable.where(conditions_of(conditions))
        return ModelListing(self._kind, self._columns, rows, self._order)

    def order_by(self, *keys: Order) -> ModelListing[T]:
        """These models in another order; where it leaves that open, newest first.

        Args:
            keys: Each `metric(...)`, "created", "name", "train_name" or "base". A minus sign before
                it descends. Models without the metric come last.

        Raises:
            InvalidArgumentError: It is none of these.
        """
        wanted = tuple(map(Key.of, keys))
        order = f"by {', '.join(map(str, wanted))}" if wanted else "newest first"
        return ModelListing(self._kind, self._columns, self._searchable.order_by(wanted), order)
