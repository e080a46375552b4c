"""What callers hand over: taken as meant, or refused by name.

Every function takes the argument's name, which the message of an `InvalidArgumentError` begins
with, and what was handed over, which no message repeats: it may be a secret in the wrong place.
"""

from __future__ import annotations

import math
import numbers
import os
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from .errors import InvalidArgumentError

T = TypeVar("T")


def refused(argument: str, value: object, meant: str) -> InvalidArgumentError:
    """The error that says what to pass, and of which type is what was passed.

    Args:
        argument: Its name.
        value: What was passed.
        meant: What to pass, such as "text".
    """
    given = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return InvalidArgumentError(f"{argument} takes {meant}, not {_NAMES.get(given, given)}")


_NAMES = {"NoneType": "None", "str": "text (str)", "bytes": "bytes, which are no text"}


def instance(argument: str, value: object, kind: type[T], meant: str | None = None) -> T:
    """`value`, if it is of that class.

    Args:
        argument: Its name.
        value: What was passed.
        kind: Its class.
        meant: What to pass, in words; the class's name if None.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise refused(argument, value, meant or f"{article} {kind.__name__}")
    return value


def text(argument: str, value: object) -> str:
    """One text, which UTF-8 can hold: no half of a surrogate pair."""
    known = instance(argument, value, str, "text")
    try:
        known.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{argument} takes text that UTF-8 can hold") from error
    return known


def texts(argument: str, value: object) -> tuple[str, ...]:
    """Several texts; a lone one is one of them, not its letters."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise refused(argument, value, "text, or several texts such as ['a', 'b']")
    return tuple(text(f"each of {argument}", item) for item in value)


def whole(argument: str, value: object) -> int:
    """A whole number, such as numpy's too; `True` is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise refused(argument, value, "a whole number")
    return int(value)


def number(argument: str, value: object) -> float:
    """A number, such as numpy's too; `True` is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refused(argument, value, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise InvalidArgumentError(f"{argument} takes a number of at most 1.8e308") from error


def finite(argument: str, value: object) -> float:
    """A number that is neither NaN nor infinite."""
    given = number(argument, value)
    if not math.isfinite(given):
        raise InvalidArgumentError(f"{argument} takes a finite number, not NaN or infinity")
    return given


def seconds(argument: str, value: object) -> float:
    """A span of time."""
    span = number(argument, value)
    if math.isnan(span) or span < 0:
        raise InvalidArgumentError(f"{argument} takes seconds, 0 or more")
    return span


def moment(argument: str, value: object) -> datetime:
    """A time; one without a time zone is refused, as nobody knows whose it is."""
    given = instance(argument, value, datetime, "a datetime with a time zone")
    if given.utcoffset() is None:
        raise InvalidArgumentError(
            f"{argument} takes a datetime with a time zone, such as datetime.now(timezone.utc)"
        )
    return given


def past(argument: str, value: object) -> datetime:
    """A time that is not in the future, in UTC. One without a time zone is refused."""
    given = moment(argument, value)
    if given > datetime.now(UTC):
        raise InvalidArgumentError(f"{argument} takes a time that is not in the future")
    return given.astimezone(UTC)


def truth(argument: str, value: object) -> bool:
    """True or False; text such as "no" is neither."""
    return instance(argument, value, bool, "True or False")


def choice(argument: str, value: object, known: Iterable[str]) -> str:
    """One of some texts."""
    every = list(known)
    meant = " or ".join(filter(None, [", ".join(map(repr, every[:-1])), repr(every[-1])]))
    given = instance(argument, value, str, meant)
    if given not in every:
        near = get_close_matches(given, every, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidArgumentError(f"{argument} takes {meant}, not another text{hint}")
    return given


def path(argument: str, value: object) -> Path:
    """A path; `~` is the user's home.

    Raises:
        InvalidArgumentError: It is none, is empty, or cannot be the name of a file here.
    """
    if not isinstance(value, str | os.PathLike):
        raise refused(argument, value, "a path, as text or pathlib.Path")
    plain = os.fspath(value)
    if not isinstance(plain, str):
        raise refused(argument, plain, "a path, as text or pathlib.Path")
    try:
        os.fsencode(plain)
        expanded = Path(plain).expanduser()
    except (UnicodeEncodeError, RuntimeError) as error:
        raise InvalidArgumentError(f"{argument} takes a path that can exist here") from error
    if not plain or "\0" in plain:
        raise InvalidArgumentError(f"{argument} takes a path, not an empty one or one with a NUL")
    return expanded


def identifier(argument: str, value: object) -> uuid.UUID:
    """A UUID, or its text."""
    if isinstance(value, uuid.UUID):
        return value
    given = instance(argument, value, str, "a uuid.UUID or its text")
    try:
        return uuid.UUID(given)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{argument} takes a uuid.UUID or its text, such as {str(_EXAMPLE)!r}"
        ) from error


_EXAMPLE = uuid.UUID("a1b2c3d4-0000-4000-8000-000000000000")


def mapping(argument: str, value: object) -> dict[str, Any]:
    """A copy of a mapping whose keys are text."""
    if not isinstance(value, Mapping):
        raise refused(argument, value, "a mapping such as {'key': value}")
    return {text(f"each key of {argument}", key): item for key, item in value.items()}


def name_of(argument: str, value: object, *kinds: type[Any]) -> str:
    """The name of what is meant: a value of one of these classes, or its name as text."""
    if isinstance(value, str):
        return text(argument, value)
    if not isinstance(value, kinds):
        classes = ", ".join(kind.__name__ for kind in kinds)
        raise refused(argument, value, f"a {classes.replace(', ', ' or ')}, or its name as text")
    name: str = value.name
    return name
