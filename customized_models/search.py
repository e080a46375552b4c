"""What a list of models can be asked for: conditions on metrics and tags, and an order.

>>> registry.customized_models(train_name="sweep-*").where(       # doctest: +SKIP
...     (metric("eval_loss") < 1.2) & ~tag("rejected")
... ).order_by(metric("eval_loss")).first()
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from typing import Any, Literal, NoReturn, TypeAlias

from attrs import evolve, field, frozen

from . import arguments
from .errors import InvalidArgumentError

Moment: TypeAlias = "datetime | date | str"
Operator: TypeAlias = Literal["<", "<=", "==", "!=", ">=", ">", "glob"]


@frozen
class Condition:
    """What a model fulfils or not; joined with `&` and `|`, inverted with `~`."""

    def __and__(self, other: Condition) -> Condition:
        return _joined("and", self, other)

    def __or__(self, other: Condition) -> Condition:
        return _joined("or", self, other)

    def __invert__(self) -> Condition:
        return Inverted(self)

    def __bool__(self) -> NoReturn:
        raise InvalidArgumentError(
            "a condition is neither true nor false: join conditions with &, | and ~, each in "
            "parentheses, as in (metric('a') > 1) & (metric('a') < 2)"
        )


@frozen
class OnColumn(Condition):
    """A column of the level's own table, compared."""

    column: str
    operator: Operator
    value: Any


@frozen
class OnMetric(Condition):
    """A metric, compared; models that do not have it do not fulfil it."""

    name: str
    operator: Operator
    value: float


@frozen
class Tagged(Condition):
    """Whether a model has a tag that matches a pattern."""

    pattern: str


@frozen
class Joined(Condition):
    """Several conditions."""

    operator: Literal["and", "or"]
    conditions: tuple[Condition, ...]


def _joined(operator: Literal["and", "or"], one: Condition, other: object) -> Condition:
    """Both; what is joined by the same operator already is one flat list.

    Raises:
        InvalidArgumentError: `other` is no condition, or there are too many.
    """
    conditions: list[Condition] = []
    for part in (one, _condition(other)):
        if isinstance(part, Joined) and part.operator == operator:
            conditions += part.conditions
        else:
            conditions.append(part)
    if len(conditions) > _MOST:
        raise InvalidArgumentError(
            f"at most {_MOST} conditions can be joined; one with a pattern stands for many, as "
            f"tag('team:*') does"
        )
    return Joined(operator, tuple(conditions))


_MOST = 500  # SQLite reads expressions that are up to 1000 deep, and each condition is a step


@frozen
class Inverted(Condition):
    """A condition that is not to be fulfilled."""

    condition: Condition


@frozen(eq=False)
class Metric:
    """A metric of a model's card, to be compared with a number or to order by; see `metric`."""

    name: str
    descending: bool = field(default=False, kw_only=True)

    def __lt__(self, bound: float) -> Condition:
        return self._compared("<", bound)

    def __le__(self, bound: float) -> Condition:
        return self._compared("<=", bound)

    def __gt__(self, bound: float) -> Condition:
        return self._compared(">", bound)

    def __ge__(self, bound: float) -> Condition:
        return self._compared(">=", bound)

    def __eq__(self, bound: float) -> Condition:  # type: ignore[override]
        return self._compared("==", bound)

    def __ne__(self, bound: float) -> Condition:  # type: ignore[override]
        return self._compared("!=", bound)

    def __neg__(self) -> Metric:
        return evolve(self, descending=not self.descending)

    def _compared(self, operator: Operator, bound: object) -> Condition:
        number = arguments.number(f"what metric {self.name!r} is compared with", bound)
        return OnMetric(self.name, operator, number)


def metric(name: str) -> Metric:
    """What was measured of a model: a metric of its card's evaluation, by its name.

    `steps`, `epochs`, `first_loss`, `last_loss` and `best_metric` are metrics as well. Compared
    with a number, it is a condition; by itself an order, smallest first, and with a minus sign
    largest first.

    >>> metric("eval_loss") < 1.2
    OnMetric(name='eval_loss', operator='<', value=1.2)
    """
    return Metric(arguments.text("metric", name))


def tag(pattern: str) -> Condition:
    """Whether a model has a tag; `*` stands for any text, and `?` for any character.

    >>> ~tag("rejected")
    Inverted(condition=Tagged(pattern='rejected'))
    """
    return Tagged(arguments.text("tag", pattern))


def is_pattern(text: str) -> bool:
    """Whether a text stands for several, by `*` or `?`."""
    return "*" in text or "?" in text


Order: TypeAlias = "Metric | str"
"""What `order_by` takes: a metric, or the name of a field, with `-` before it to descend."""

FIELDS = ("created", "name", "train_name", "base", "size")
"""The fields that a list can be ordered by."""


@frozen
class Key:
    """What a list is ordered by."""

    name: str
    is_metric: bool
    descending: bool

    @classmethod
    def of(cls, given: object) -> Key:
        """The key that a caller means.

        Raises:
            InvalidArgumentError: It is neither a metric nor the name of a field.
        """
        if isinstance(given, Metric):
            return cls(given.name, True, given.descending)
        name = arguments.instance("order_by", given, str, "metric('eval_loss') or 'created'")
        field_name = arguments.choice("order_by", name.removeprefix("-"), FIELDS)
        return cls(field_name, False, name.startswith("-"))

    def __str__(self) -> str:
        return f"-{self.name}" if self.descending else self.name


def conditions_of(given: tuple[object, ...]) -> tuple[Condition, ...]:
    """The arguments of `where`, checked."""
    return tuple(_condition(one) for one in given)


def _condition(given: object) -> Condition:
    meant = "a condition, such as metric('eval_loss') < 1.2 or tag('keep')"
    return arguments.instance("where", given, Condition, meant)


def since_and_until(since: object, until: object) -> tuple[OnColumn, ...]:
    """Conditions on when a model was made: at `since` or later, and before `until`."""
    bounds: tuple[tuple[str, object, Operator], ...] = (
        ("since", since, ">="),
        ("until", until, "<"),
    )
    return tuple(
        OnColumn("created", operator, _seconds(argument, given))
        for argument, given, operator in bounds
        if given is not None
    )


def _seconds(argument: str, given: object) -> float:
    """A moment as seconds since the epoch; a date begins at midnight in UTC.

    A time without a time zone is refused, as everywhere.
    """
    if isinstance(given, str):
        try:
            given = datetime.fromisoformat(given) if len(given) > 10 else date.fromisoformat(given)
        except ValueError as error:
            raise InvalidArgumentError(
                f"{argument} takes a date or a time, or its text such as '2026-01-31'"
            ) from error
    if isinstance(given, datetime):
        return arguments.moment(argument, given).timestamp()
    if isinstance(given, date):
        return datetime.combine(given, time(), UTC).timestamp()
    raise arguments.refused(argument, given, "a date or a time, or its text such as '2026-01-31'")
