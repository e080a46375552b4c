"""Rows of tags, aliases and descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from ..errors import NotFoundError, shown
from ..labels import Labels, Reference
from .aliases import aliases_of, find_alias, reference_of, remove_alias
from .database import Database
from .events import record
from .levels import Levels
from .rows import TABLES
from .schema import aliases, descriptions, tags


class LabelRows:
    """What was said of the models of a registry. Each change is an event as well."""

    def __init__(self, database: Database, levels: Levels) -> None:
        self._database = database
        self._levels = levels

    def of(self, model: Any) -> Labels:
        """All of a model; `NotFoundError` if it is not there."""
        with self._database.read() as connection:
            self._levels.in_transaction(connection, type(model), model.name)
            return Labels(
                tags=tuple(_tags(connection, model)),
                aliases=tuple(
                    reference_of(row) for row in aliases_of(connection, type(model), model.name)
                ),
                description=_description(connection, model),
            )

    def tag(self, model: Any, given: Sequence[str]) -> None:
        """Give a model tags, besides those that it has."""
        with self._database.write() as connection:
            self._levels.in_transaction(connection, type(model), model.name)
            known = _tags(connection, model)
            if new := [tag for tag in given if tag not in known]:
                connection.execute(insert(tags), [_key(model) | {"tag": tag} for tag in new])
                _record_tags(connection, "tagged", model, known)

    def untag(self, model: Any, given: Sequence[str]) -> None:
        """Take tags from a model; those that it does not have are no error."""
        with self._database.write() as connection:
            known = _tags(connection, model)
            if not set(given).isdisjoint(known):
                connection.execute(delete(tags).where(*_of(tags, model), tags.c.tag.in_(given)))
                _record_tags(connection, "untagged", model, known)

    def describe(self, model: Any, text: str) -> None:
        """Give a model another description."""
        with self._database.write() as connection:
            self._levels.in_transaction(connection, type(model), model.name)
            before = _description(connection, model)
            if text == before:
                return
            connection.execute(delete(descriptions).where(*_of(descriptions, model)))
            connection.execute(insert(descriptions).values(**_key(model), text=text))
            facts = ({"description": before}, {"description": text})
            record(connection, "described", type(model), model.name, *facts)

    def set_alias(self, model: Any, alias: str, protected: bool | None) -> None:
        """Let an alias of the model's training stand for it, whatever it stood for before.

        Args:
            model: A model.
            alias: Of its training.
            protected: Whether the model may not be deleted; as it was for the alias if None.
        """
        kind: Any = type(model)
        reference = Reference(alias, model.train_name)
        with self._database.write() as connection:
            self._levels.in_transaction(connection, kind, model.name)
            row = find_alias(connection, kind, reference)
            before = {"model": row["name"], "protected": bool(row["protected"])} if row else {}
            keep = before.get("protected", False) if protected is None else protected
            after = {"model": model.name, "protected": keep}
            if before == after:
                return
            if row is not None:
                key = (aliases.c.level == row["level"], aliases.c.train_name == row["train_name"])
                connection.execute(delete(aliases).where(*key, aliases.c.alias == alias))
            connection.execute(
                insert(aliases).values(
                    **_key(model),
                    train_name=reference.train_name,
                    alias=alias,
                    protected=int(keep),
                )
            )
            about = [str(reference), *filter(None, [before.get("model")])]
            facts = ({"alias": str(reference)} | before, {"alias": str(reference)} | after)
            record(connection, "alias set", kind, model.name, *facts, about)

    def remove_alias(self, model: Any, alias: str) -> None:
        """Let an alias of a model stand for nothing.

        Raises:
            NotFoundError: The model does not have it.
        """
        with self._database.write() as connection:
            row = find_alias(connection, type(model), Reference(alias, model.train_name))
            if row is None or row["name"] != model.name:
                raise NotFoundError(f"{model.name} does not have the alias {shown(alias)}")
            remove_alias(connection, type(model), row)


def _key(model: Any) -> dict[str, str]:
    return {"level": TABLES[type(model)].name, "name": model.name}


def _of(table: Any, model: Any) -> tuple[Any, Any]:
    return table.c.level == TABLES[type(model)].name, table.c.name == model.name


def _tags(connection: Connection, model: Any) -> list[str]:
    query = select(tags.c.tag).where(*_of(tags, model)).order_by(tags.c.tag)
    return list(connection.execute(query).scalars())


def _record_tags(connection: Connection, action: Any, model: Any, before: list[str]) -> None:
    facts = ({"tags": before}, {"tags": _tags(connection, model)})
    record(connection, action, type(model), model.name, *facts)


def _description(connection: Connection, model: Any) -> str:
    query = select(descriptions.c.text).where(*_of(descriptions, model))
    return connection.execute(query).scalar() or ""
