"""Values: frozen, checked by their own annotations, shown in notebooks, JSON for everyone else."""

from __future__ import annotations

import functools
import types
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from attrs import NOTHING, Attribute, Converter, fields, has
from attrs.converters import pipe

from . import arguments
from .display import html_table
from .errors import CustomizedModelsError, InvalidArgumentError, listed
from .files.documents import to_document


class Value:
    """What every value of this library can do, besides what its fields are for.

    Law: `json.dumps(value.to_dict())` works, and `dict(value)` has the fields as they are.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: a UUID as text, a time as ISO 8601, values as dicts."""
        document: dict[str, Any] = to_document(self)
        return document

    def keys(self) -> tuple[str, ...]:
        """The names of the fields; with them, `dict(value)` and `**value` work."""
        return tuple(a.name for a in fields(type(self)))  # type: ignore[arg-type]  # subclasses are

    def __getitem__(self, field: str) -> Any:
        if field not in self.keys():
            raise KeyError(field)
        return getattr(self, field)

    def _repr_html_(self) -> str:
        return html_table(("field", "value"), [(name, self[name]) for name in self.keys()])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """For web services: an object with the fields, in both directions."""
        from pydantic_core import core_schema

        hints = _hints(source)
        given = core_schema.typed_dict_schema(
            {
                a.name: core_schema.typed_dict_field(
                    handler.generate_schema(hints[a.name]), required=a.default is NOTHING
                )
                for a in fields(cls)  # type: ignore[arg-type]  # subclasses are attrs classes
            },
            cls_name=cls.__name__,
            extra_behavior="forbid",
        )
        made = core_schema.no_info_after_validator_function(cls._of_fields, given)
        return core_schema.json_or_python_schema(
            json_schema=made,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), made]),
            serialization=core_schema.plain_serializer_function_ser_schema(
                dict, return_schema=given
            ),
        )

    @classmethod
    def _of_fields(cls, given: Mapping[str, Any]) -> Self:
        try:
            return cls(**given)
        except CustomizedModelsError as error:
            raise ValueError(str(error)) from error  # which pydantic reports as the caller's


def checked(cls: type[Any], attributes: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """For `frozen(field_transformer=checked)`: fields take what their annotations say.

    A lone text becomes a tuple of one, the text of a UUID the UUID, a mapping the value that it has
    the fields of; anything else of another type is refused.
    """
    return [
        a.evolve(converter=pipe(a.converter, _CONVERTER) if a.converter else _CONVERTER)
        for a in attributes
    ]


def _converted(value: Any, instance: Any, attribute: Attribute[Any]) -> Any:
    cls: Any = type(instance)
    return _takers(cls)[attribute.name](value)


_CONVERTER = Converter(_converted, takes_self=True, takes_field=True)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


@functools.cache
def _takers(cls: Any) -> dict[str, Callable[[object], Any]]:
    """By field, what takes a value for it."""
    return {
        name: functools.partial(_taker(hint), f"{cls.__name__}.{name}")
        for name, hint in _hints(cls).items()
    }


def value_of(argument: str, value: object, kind: type[Any]) -> Any:
    """A value of class `kind`, or one made of a mapping that has its fields.

    Raises:
        InvalidArgumentError: It is neither, has unknown fields, or lacks some.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise arguments.refused(argument, value, f"{kind.__name__}(...), or a dict of its fields")
    given, known = arguments.mapping(argument, value), {a.name: a for a in fields(kind)}
    if unknown := given.keys() - known.keys():
        raise InvalidArgumentError(
            f"{argument} has no field {listed(unknown)}; "
            f"{kind.__name__} has {', '.join(map(repr, known))}"
        )
    missing = {name for name, a in known.items() if a.default is NOTHING} - given.keys()
    if missing:
        raise InvalidArgumentError(f"{argument} lacks the field {listed(missing)}")
    try:
        return kind(**given)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{argument}: {error}") from error


_PLAIN: Mapping[Any, Callable[[str, object], Any]] = {
    Any: lambda argument, value: value,
    str: arguments.text,
    bool: arguments.truth,
    int: arguments.whole,
    float: arguments.number,
    uuid.UUID: arguments.identifier,
    tuple[str, ...]: arguments.texts,
    datetime: lambda argument, value: arguments.instance(argument, value, datetime),
}


def _taker(hint: Any) -> Callable[[str, object], Any]:
    """What takes an argument as an annotation means it."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (part,) = (part for part in parts if part is not types.NoneType)
        inner = _taker(part)
        return lambda argument, value: None if value is None else inner(argument, value)
    if origin is Literal:
        return lambda argument, value: arguments.choice(argument, value, parts)
    if origin is Mapping:
        return functools.partial(_mapping, _taker(parts[1]))
    if origin is tuple:
        return functools.partial(_items, _taker(parts[0]))
    if has(hint):
        return lambda argument, value: value_of(argument, value, hint)
    raise NotImplementedError(f"no rule for {hint}")


def _mapping(taker: Callable[[str, object], Any], argument: str, value: object) -> dict[str, Any]:
    given = arguments.mapping(argument, value)
    return {key: taker(f"{argument}[{key!r}]", item) for key, item in given.items()}


def _items(taker: Callable[[str, object], Any], argument: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise arguments.refused(argument, value, "several, such as a list")
    return tuple(taker(f"each of {argument}", item) for item in value)
