"""What a registry's lists of models return: a listing that can be narrowed, ordered and plotted."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from attrs import frozen

from .. import arguments
from ..pictures import scatter_svg
from ..search import Condition, Key, Order, conditions_of
from .listing import Listing, Rows

T = TypeVar("T")


class SearchableRows(Rows[T], Protocol[T]):
    """Where a listing of models finds them."""

    def where(self, conditions: tuple[Condition, ...]) -> SearchableRows[T]:
        """Those that fulfil all of these conditions as well."""

    def order_by(self, keys: tuple[Key, ...]) -> SearchableRows[T]:
        """The same in another order."""

    def measured(self, metric: str) -> list[tuple[str, float]]:
        """Name and value of a metric of those that have it, in their order."""


@frozen
class MetricPlot:
    """A metric over models: a picture in a notebook, and points for any plotting package.

    >>> MetricPlot("eval_loss", (("a", 1.5), ("b", 0.5)))
    MetricPlot(metric='eval_loss', points=(('a', 1.5), ('b', 0.5)))

    Attributes:
        metric: Its name.
        points: The name of each model and its value, from left to right.
    """

    metric: str
    points: tuple[tuple[str, float], ...]

    def _repr_html_(self) -> str:
        return scatter_svg(self.metric, self.points)


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
            keys: Each `metric(...)`, "created", "name", "train_name", "base" or "size"; descending
                with a minus sign before it. Models without the metric come last.

        Raises:
            InvalidArgumentError: It is none of these.
        """
        wanted = tuple(map(Key.of, keys))
        order = f"by {', '.join(map(str, wanted))}" if wanted else "newest first"
        return ModelListing(self._kind, self._columns, self._searchable.order_by(wanted), order)

    def plot(self, metric: str) -> MetricPlot:
        """A metric of these models as a picture in a notebook; those without it are left out.

        The first of the list is at the right: the newest one, as long as the list is not ordered.

        >>> registry.customized_models(train_name="sweep-*").plot("eval_loss")  # doctest: +SKIP

        Args:
            metric: Its name, as for `customized_models.metric`.
        """
        wanted = arguments.text("metric", metric)
        return MetricPlot(wanted, tuple(reversed(self._searchable.measured(wanted))))
