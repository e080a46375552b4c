"""The functions that every Go template has.

Source: `text/template/funcs.go` of Go 1.26. `and` and `or` are in `execution`: they do not
evaluate all of their arguments. What takes no part in prompts (`call`, `html`, `js`, `urlquery`)
is known by name and refused when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Never

from attrs import frozen

from .errors import GoExecutionError, GoUnsupportedError
from .values import Map, Value, as_json, is_true, items_of, printed, type_name


@frozen
class GoFunction:
    """`call`: takes the values of its arguments. `least`, `most`: how many; None for any."""

    call: Callable[..., Value]
    least: int = 0
    most: int | None = None


def _kind(value: Value) -> str:
    """`basicKind`: what two values must have in common to be compared."""
    for kind, types in (("bool", bool), ("int", int), ("float", float), ("string", bytes)):
        if isinstance(value, types):
            return kind
    return "none"


def _eq(first: Value, *others: Value) -> bool:
    if not others:
        raise GoExecutionError("error calling eq: missing argument for comparison")
    return any(_same(first, other) for other in others)


def _same(first: Value, other: Value) -> bool:
    if first is None or other is None:
        return first is None and other is None
    if _kind(first) != _kind(other):
        raise GoExecutionError("error calling eq: incompatible types for comparison")
    if _kind(first) == "none":
        raise GoUnsupportedError(f"comparing {type_name(first)}")
    return bool(first == other)


def _less(first: Value, other: Value) -> bool:
    for value in (first, other):
        if _kind(value) in ("bool", "none"):
            raise GoExecutionError("error calling lt: invalid type for comparison")
    if _kind(first) != _kind(other):
        raise GoExecutionError("error calling lt: incompatible types for comparison")
    return bool(first < other)


def _len(value: Value) -> int:
    items = items_of(value)
    if items is not None:
        return len(items)
    if isinstance(value, Map):
        return len(value.values)
    if isinstance(value, bytes):
        return len(value)
    raise GoExecutionError(f"error calling len: len of type {type_name(value)}")


def _position(index: Value, limit: int) -> int:
    """An index from 0 to `limit`."""
    if isinstance(index, bool) or not isinstance(index, int):
        raise GoExecutionError(f"cannot index slice/array with type {type_name(index)}")
    if not 0 <= index <= limit:
        raise GoExecutionError(f"index out of range: {index}")
    return index


def _index(value: Value, *indexes: Value) -> Value:
    if value is None:
        raise GoExecutionError("error calling index: index of untyped nil")
    for index in indexes:
        items = items_of(value)
        if isinstance(value, Map):
            if not isinstance(index, bytes):
                raise GoExecutionError(f"value has type {type_name(index)}; should be string")
            value = value.values.get(index.decode("utf-8", "replace"))
        elif items is not None or isinstance(value, bytes):
            sequence = value if items is None else items
            value = sequence[_position(index, len(sequence) - 1)]
        else:
            raise GoExecutionError(f"error calling index: can't index {type_name(value)}")
    return value


def _slice(value: Value, *indexes: Value) -> Value:
    sequence = value if isinstance(value, bytes) else items_of(value)
    if sequence is None:
        raise GoExecutionError(f"error calling slice: can't slice {type_name(value)}")
    if len(indexes) > 2:
        raise GoUnsupportedError("slice with three indexes")
    start = _position(indexes[0] if indexes else 0, len(sequence))
    end = _position(indexes[1] if len(indexes) > 1 else len(sequence), len(sequence))
    if start > end:
        raise GoExecutionError(f"error calling slice: invalid slice index: {start} > {end}")
    return sequence[start:end]


def _print(*values: Value) -> bytes:
    """`fmt.Sprint`: a blank between two values of which neither is a string."""
    result = b""
    for position, value in enumerate(values):
        neither = position > 0 and not any(
            isinstance(v, bytes) for v in (value, values[position - 1])
        )
        result += (b" " if neither else b"") + _as_go_prints(value)
    return result


def _println(*values: Value) -> bytes:
    return b" ".join(map(_as_go_prints, values)) + b"\n"


def _as_go_prints(value: Value) -> bytes:
    return b"<nil>" if value is None else printed(value)


_VERB = re.compile(rb"%(.)", re.DOTALL)


def _printf(form: Value, *values: Value) -> bytes:
    """`fmt.Sprintf` with the verbs `%s`, `%v`, `%d`, `%t`, `%q` and `%%`."""
    if not isinstance(form, bytes):
        raise GoExecutionError(f"wrong type for value; expected string; got {type_name(form)}")
    left = list(values)

    def written(match: re.Match[bytes]) -> bytes:
        verb = match[1].decode("latin-1")
        if verb == "%":
            return b"%"
        if verb not in _VERBS or not left:
            raise GoUnsupportedError(f"printf with {form!r} and {len(values)} values")
        value = left.pop(0)
        if not isinstance(value, _VERBS[verb]) or (verb == "d" and isinstance(value, bool)):
            raise GoUnsupportedError(f"printf of {type_name(value)} with %{verb}")
        return _quoted(value) if verb == "q" else _as_go_prints(value)

    result: bytes = _VERB.sub(written, form)
    if left or form.count(b"%") != sum(2 if m[1] == b"%" else 1 for m in _VERB.finditer(form)):
        raise GoUnsupportedError(f"printf with {form!r} and {len(values)} values")
    return result


def _quoted(value: bytes) -> bytes:
    """`strconv.Quote` of ASCII text."""
    if not re.fullmatch(rb"[ -~\n]*", value):
        raise GoUnsupportedError("printf with %q of other than ASCII text")
    escaped = value.replace(b"\\", rb"\\").replace(b'"', rb"\"").replace(b"\n", rb"\n")
    return b'"' + escaped + b'"'


_VERBS: Mapping[str, Any] = {
    "s": bytes, "q": bytes, "d": int, "t": bool, "v": (bytes, int, bool, type(None)),
}  # fmt: skip


def _unsupported(name: str) -> GoFunction:
    def call(*_: Value) -> Never:
        raise GoUnsupportedError(f"the function {name!r}")

    return GoFunction(call)


BUILT_IN: Mapping[str, GoFunction] = {
    "and": GoFunction(lambda *values: values[-1], 1),
    "or": GoFunction(lambda *values: values[-1], 1),
    "not": GoFunction(lambda value: not is_true(value), 1, 1),
    "eq": GoFunction(_eq, 1),
    "ne": GoFunction(lambda first, other: not _same(first, other), 2, 2),
    "lt": GoFunction(_less, 2, 2),
    "le": GoFunction(lambda first, other: _less(first, other) or _same(first, other), 2, 2),
    "gt": GoFunction(lambda first, other: not (_less(first, other) or _same(first, other)), 2, 2),
    "ge": GoFunction(lambda first, other: not _less(first, other), 2, 2),
    "len": GoFunction(_len, 1, 1),
    "index": GoFunction(_index, 1),
    "slice": GoFunction(_slice, 1),
    "print": GoFunction(_print),
    "printf": GoFunction(_printf, 1),
    "println": GoFunction(_println),
    **{name: _unsupported(name) for name in ("call", "html", "js", "urlquery")},
}


def json_function(value: Value) -> bytes:
    """Ollama's `json`."""
    return as_json(value)
