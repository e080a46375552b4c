"""Rows of base models: besides the value, where each lies on this host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attrs import evolve
from sqlalchemy import Connection, select

from ..base_models import Location, same_path
from ..errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    BaseModelMissingError,
    listed,
    shown,
)
from ..files.digests import canonical_json
from ..files.documents import from_document, to_document
from ..files.links import hub_id
from ..models import BaseModel
from .database import Database
from .events import record
from .rows import (
    change_row,
    checked_row,
    differences,
    find_row,
    insert_value,
    required,
    update_value,
    value_of,
)
from .schema import base_models


class Bases:
    """The base models of a registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, base: BaseModel, location: Location) -> BaseModel:
        """Add a base model; adding the same again gives the one that is there.

        One without a place, as records of its models bring it, gets this one's.

        Raises:
            AlreadyExistsError: A name is taken by another; the message says what differs.
        """
        with self._database.write() as connection:
            row = find_row(connection, base_models, name=base.technical_name)
            if row is not None:
                known = value_of(BaseModel, row)
                if row["path"] is None and known.digest == base.digest:
                    return _placed(connection, base, known, location)
                return _added_again(base, known)
            other = find_row(connection, base_models, model_name=base.model_name)
            if other is not None:
                raise AlreadyExistsError(
                    f"base model {shown(other['name'])} has the model name "
                    f"{shown(base.model_name)} already; model_name= gives another"
                )
            insert_value(connection, base, **_columns(location))
        return base

    def change(self, base: BaseModel) -> None:
        """Put a changed value in place of the one of its name; where it lies stays."""
        with self._database.write() as connection:
            required(connection, BaseModel, base.name)
            update_value(connection, base)

    def relocate(self, name: str, location: Location) -> BaseModel:
        """Say where a base model lies now.

        Raises:
            NotFoundError: There is no such base model.
            BaseModelMismatch: Other bytes lie there.
        """
        with self._database.write() as connection:
            row = required(connection, BaseModel, name)
            known = value_of(BaseModel, row)
            if location.digest != known.digest:
                raise BaseModelMismatch(
                    f"{shown(location.path)} holds {location.digest}, "
                    f"but base model {known.name} is {known.digest}"
                )
            change_row(connection, base_models, name, **_columns(location))
            if location.path != row["path"]:
                places = ({"path": row["path"]}, {"path": location.path})
                record(connection, "relocated", BaseModel, name, *places)
        return known

    def location(self, connection: Connection, name: str) -> Location:
        """Where a base model lies.

        Raises:
            NotFoundError: There is no such base model.
            BaseModelMissingError: It is not known where it lies.
        """
        return _location(required(connection, BaseModel, name))

    def find(self, connection: Connection, stated: object) -> BaseModel:
        """The one base model that a training calls `stated`: its name, Hub id or path.

        Raises:
            BaseModelMismatch: None or several match; the message lists the candidates.
        """
        rows = list(connection.execute(select(base_models)).mappings())
        matching = [
            row
            for row in rows
            if stated in (row["name"], row["model_name"])
            or (isinstance(stated, str) and hub_id(Path(stated)) == row["model_name"])
            or (row["path"] and same_path(stated, row["path"]))
        ]
        if len(matching) != 1:
            candidates = listed(row["name"] for row in rows) or "none; add_base_model adds one"
            raise BaseModelMismatch(
                f"{len(matching)} base models match {shown(stated)}; "
                f"say base_model=, one of: {candidates}"
            )
        return value_of(BaseModel, matching[0])


def _placed(
    connection: Connection, base: BaseModel, known: BaseModel, location: Location
) -> BaseModel:
    """What is added, in place of what a record has said of it."""
    template = base.deployment_template or known.deployment_template
    added = evolve(base, created=known.created, deployment_template=template)
    _added_again(base, evolve(added, model_name=known.model_name))
    update_value(connection, added, action="relocated", **_columns(location))
    return added


def _added_again(new: BaseModel, known: BaseModel) -> BaseModel:
    template = new.deployment_template or known.deployment_template
    same = evolve(new, created=known.created, card=known.card, deployment_template=template)
    if same == known:
        return known
    raise AlreadyExistsError(
        f"base model {shown(known.name)} exists with {differences(known, same)}; "
        f"set_deployment_template changes the template, and another base has another name"
    )


def _columns(location: Location) -> dict[str, Any]:
    """A base model's location as its row has it."""
    return {"path": location.path, "files": canonical_json(to_document(location.files)).decode()}


def _location(row: Any) -> Location:
    """Law: `_location` of a row with `_columns(l)` equals `l`."""
    checked_row(base_models, row)
    if row["path"] is None:
        raise BaseModelMissingError(
            f"it is not known where base model {row['name']} lies; "
            f"name its place with relocate_base_model"
        )
    return from_document(Location, {"path": row["path"], "files": json.loads(row["files"])})
