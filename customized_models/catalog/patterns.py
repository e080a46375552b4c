"""Patterns with `*` and `?` in SQL."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Dialect, String, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType, TypeDecorator


def fits(column: Any, pattern: str) -> ColumnElement[bool]:
    """Whether a text is as the pattern says: `*` is any text, `?` any character."""
    return _Fits(column, bindparam(None, pattern, _Pattern(), unique=True))


class _Fits(FunctionElement[Any]):
    """GLOB in SQLite, whose LIKE takes capital letters for small ones; LIKE elsewhere."""

    type = NullType()  # SQLite would get `(... GLOB ...) = 1`, and read no index, for a boolean
    inherit_cache = True


class _Pattern(TypeDecorator[str]):
    """A pattern, which each database gets as its operator takes it."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if dialect.name == "sqlite":  # GLOB has sets of characters too, which are none here
            return value.replace("[", "[[]")
        for special in "\\%_":
            value = value.replace(special, f"\\{special}")
        return value.replace("*", "%").replace("?", "_")


@compiles(_Fits)
def _like(element: _Fits, compiler: Any, **options: Any) -> str:
    return _infix("LIKE", element, compiler, options)


@compiles(_Fits, "sqlite")
def _glob(element: _Fits, compiler: Any, **options: Any) -> str:
    return _infix("GLOB", element, compiler, options)


def _infix(operator: str, element: _Fits, compiler: Any, options: dict[str, Any]) -> str:
    column, pattern = (compiler.process(clause, **options) for clause in element.clauses)
    return f"({column} {operator} {pattern})"
