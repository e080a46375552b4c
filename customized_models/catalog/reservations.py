"""Names that trainings will give to their customized models, fixed before they are made."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from attrs import frozen
from sqlalchemy import Connection

from ..errors import AlreadyExistsError, shown
from ..models import BaseModel
from ..naming import customized_name
from .database import Database
from .rows import add_row, checked_row, find_row, required
from .schema import customized_models, reservations

_DRAWS = 1000  # of 65,536 names a day: when all of these are taken, few are left


@frozen
class Reservation:
    """A name, and the training that it belongs to."""

    name: str
    base: str
    train_name: str
    training_id: uuid.UUID
    created: datetime


class Reservations:
    """The names that are reserved."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reserve(
        self, *, train_name: str, base_model: str, training_id: uuid.UUID | None = None
    ) -> Reservation:
        """As `in_transaction`, in a transaction of its own."""
        with self._database.write() as connection:
            return self.in_transaction(
                connection, train_name=train_name, base_model=base_model, training_id=training_id
            )

    def in_transaction(
        self,
        connection: Connection,
        *,
        train_name: str,
        base_model: str,
        training_id: uuid.UUID | None,
        created: datetime | None = None,
    ) -> Reservation:
        """The reservation of a training, made now or earlier.

        The same training id gets the same name again, whatever the date has become. One of ours is
        drawn if None: where its four characters are taken, another is.

        Args:
            connection: Of the transaction.
            train_name: Of the training.
            base_model: The technical name of its base.
            training_id: Drawn if None.
            created: The date of a name that is new, in UTC; now if None.

        Raises:
            NotFoundError: There is no such base model.
            AlreadyExistsError: Another training has that name, or this id trains something else.
        """
        required(connection, BaseModel, base_model)
        created = created or datetime.now(UTC)
        if training_id is not None:
            return _reserve(connection, train_name, base_model, training_id, created)
        for _ in range(_DRAWS):
            drawn = _planned(train_name, base_model, uuid.uuid4(), created)
            if _is_free(connection, drawn.name):
                return _add(connection, drawn)
        raise AlreadyExistsError(
            f"no name for {shown(train_name)} is free on {created:%Y-%m-%d}; use another train name"
        )


def _reserve(
    connection: Connection,
    train_name: str,
    base_model: str,
    training_id: uuid.UUID,
    created: datetime,
) -> Reservation:
    row = find_row(connection, reservations, training_id=str(training_id))
    if row is not None:
        checked_row(reservations, row)
        if (row["base"], row["train_name"]) != (base_model, train_name):
            raise AlreadyExistsError(f"training {training_id} is {shown(row['name'])}")
        reserved = datetime.fromisoformat(row["created"])
        return Reservation(row["name"], base_model, train_name, training_id, reserved)
    planned = _planned(train_name, base_model, training_id, created)
    if not _is_free(connection, planned.name):
        raise AlreadyExistsError(
            f"{planned.name} is taken by another training of that day whose id also begins with "
            f"{training_id.hex[:4]}; draw another training id"
        )
    return _add(connection, planned)


def _planned(
    train_name: str, base_model: str, training_id: uuid.UUID, created: datetime
) -> Reservation:
    name = customized_name(base_model, train_name, created, training_id)
    return Reservation(name, base_model, train_name, training_id, created)


def _is_free(connection: Connection, name: str) -> bool:
    tables = (reservations, customized_models)
    return all(find_row(connection, table, name=name) is None for table in tables)


def _add(connection: Connection, made: Reservation) -> Reservation:
    add_row(
        connection,
        reservations,
        training_id=str(made.training_id),
        name=made.name,
        base=made.base,
        train_name=made.train_name,
        created=made.created.isoformat(),
    )
    return made
