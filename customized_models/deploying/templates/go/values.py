"""Values as a Go template sees them: strings are bytes, and so are cut and counted as bytes.

| Go | here |
|---|---|
| string | bytes |
| int, float64, bool | int, float, bool |
| slice | tuple, or `PrintedSlice` where Ollama gave the type a `String` method |
| map[string]any | `Map` |
| struct, or a pointer to one | `Struct` |
| nil, or no value at all | None |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from .errors import GoExecutionError, GoUnsupportedError

Value = Any


@frozen
class Map:
    """A map; a key that is not there gives None, as with Go's `missingkey=zero`."""

    values: Mapping[str, Value]


@frozen
class Struct:
    """A struct; a field that is not there is an error."""

    type: str
    fields: Mapping[str, Value] = field(hash=False)


@frozen
class PrintedSlice:
    """A slice that prints as JSON."""

    items: tuple[Value, ...] = ()


def items_of(value: Value) -> tuple[Value, ...] | None:
    """The items of a slice; None if `value` is none."""
    if isinstance(value, PrintedSlice):
        return value.items
    return value if isinstance(value, tuple) else None


def is_true(value: Value) -> bool:
    """Whether `{{ if }}` takes its first branch.

    Source: `text/template/exec.go`, `isTrue`.
    """
    if isinstance(value, Map):
        return bool(value.values)
    if isinstance(value, Struct):
        return True
    if (items := items_of(value)) is not None:
        return bool(items)
    return bool(value)


def printed(value: Value) -> bytes:
    """What `{{ value }}` writes.

    Source: `text/template/exec.go`, `printValue`; Go's `fmt.Fprint` for the rest.
    """
    if value is None:
        return b"<no value>"
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int):
        return str(value).encode()
    if isinstance(value, PrintedSlice):
        return as_json(value)
    raise GoUnsupportedError(f"writing {type_name(value)} as text")


def as_json(value: Value) -> bytes:
    """`json.Marshal`: no blanks, sorted keys, `<`, `>` and `&` escaped.

    Source: `encoding/json` of Go, `HTMLEscape` and `appendString`.
    """
    text = json.dumps(_plain(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


def _plain(value: Value) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, PrintedSlice) and not value.items:
        return None  # a nil slice
    if isinstance(value, Map):
        return {key: _plain(item) for key, item in value.values.items()}
    if (items := items_of(value)) is not None:
        return [_plain(item) for item in items]
    if isinstance(value, bool | int) or value is None:
        return value
    raise GoUnsupportedError(f"writing {type_name(value)} as JSON")


def member(value: Value, name: str) -> Value:
    """`.name` of a value.

    Source: `text/template/exec.go`, `evalField`.

    Raises:
        GoExecutionError: Its type has no such field.
    """
    if isinstance(value, Map):
        return value.values.get(name)
    if isinstance(value, Struct) and name in value.fields:
        return value.fields[name]
    if value is None:
        # An error or nothing, by an option that Ollama sets for some executions only.
        raise GoUnsupportedError(f"the field {name} of nothing")
    raise GoExecutionError(f"can't evaluate field {name} in type {type_name(value)}")


def type_name(value: Value) -> str:
    """The name of a value's type, as in Go's messages."""
    if isinstance(value, Struct):
        return value.type
    if isinstance(value, Map):
        return "map[string]interface {}"
    if items_of(value) is not None:
        return "a slice"
    names = {bytes: "string", bool: "bool", int: "int", float: "float64", type(None): "nil"}
    return names.get(type(value), type(value).__name__)
