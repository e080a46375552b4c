"""Rows of models, environments and what third parties see: found, listed, added, changed.

A change that reaches beyond the database, to stored bytes or to a server, has a row before it is
begun: "pending" while it is being made, "deleting" while it is undone. Only "visible" rows are
shown to anyone. Whoever finds such a row whose operation has ended without a word finishes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar, overload

from attrs import evolve, frozen
from sqlalchemy import Connection, select

from .. import arguments
from ..errors import (
    AlreadyExistsError,
    IntegrityError,
    InUseError,
    InvalidArgumentError,
    JobLost,
    NotFoundError,
    listed,
    shown,
)
from ..history import Action
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    LiveModel,
    ThirdPartyModel,
)
from ..search import Condition, OnColumn, Operator, is_pattern
from .aliases import forget_labels, name_meant, refuse_if_protected
from .database import Database
from .events import record_deleted
from .leases import Leases
from .metrics import forget_metrics
from .model_listing import ModelListing
from .rows import (
    TABLES,
    VISIBLE,
    change_row,
    differences,
    find_row,
    insert_value,
    names,
    remove_row,
    required,
    update_value,
    value_of,
)
from .search import BEING_CHANGED, ModelRows, value_or_error

T = TypeVar("T", bound=Any)

STAGED: tuple[type[Any], ...] = (CustomizedModel, CompleteModel, LiveModel)
"""The classes whose rows have a stage."""


DEPLOYED = ("live", "superseded")
"""The states of a live model that is at a tool."""


@frozen
class Unfinished:
    """A change whose operation has ended before the change was made or undone.

    Attributes:
        value: As it was to be.
        stage: "pending" or "deleting".
        operation: Who was about it.
        artifact: The key of the file that a live model is served from, if it has one.
    """

    value: Any
    stage: str
    operation: str
    artifact: str | None


class Levels:
    """The rows of every class in `rows.TABLES`."""

    def __init__(self, database: Database, leases: Leases) -> None:
        self._database = database
        self._leases = leases

    def get(self, kind: type[T], name: str) -> T:
        """The visible value of that class and name.

        Raises:
            NotFoundError: There is none.
            IntegrityError: Its row is damaged.
        """
        with self._database.read() as connection:
            return self.in_transaction(connection, kind, name)

    def in_transaction(self, connection: Connection, kind: type[T], name: str) -> T:
        """As `get`, in a transaction that is open already."""
        row = required(connection, kind, name_meant(connection, kind, name))
        value = value_of(kind, row)
        if row.get("stage", VISIBLE) != VISIBLE:
            raise NotFoundError(f"{kind.__name__} {value.name} is being {_DOING[row['stage']]}")
        return value

    @overload
    def meant(self, argument: str, value: object, kind: type[T], /) -> T: ...
    @overload
    def meant(self, argument: str, value: object, *kinds: type[Any]) -> Any: ...
    def meant(self, argument: str, value: object, *kinds: type[Any]) -> Any:
        """The visible value that a caller means: by itself, or by its name.

        Args:
            argument: Its name, for the message.
            value: A value of one of these classes, or a name that one of them has.
            kinds: Classes of `rows.TABLES`.

        Raises:
            InvalidArgumentError: It is neither, or several values have that name.
            NotFoundError: There is none.
            IntegrityError: Its row is damaged.
        """
        name = arguments.name_of(argument, value, *kinds)
        if not isinstance(value, str):
            return self.get(type(value), name)
        if len(kinds) == 1:
            return self.get(kinds[0], name)
        with self._database.read() as connection:
            found = [kind for kind in kinds if _exists(connection, kind, name)]
            if len(found) > 1:
                classes = " and a ".join(kind.__name__ for kind in found)
                raise InvalidArgumentError(
                    f"{argument}: a {classes} are called {shown(name)}; pass the one that is "
                    f"meant, registry.get({found[0].__name__}, name)"
                )
            if not found:
                classes = " or ".join(kind.__name__ for kind in kinds)
                raise NotFoundError(f"no {classes} is named {shown(name)}")
            return self.in_transaction(connection, found[0], name)

    def is_visible(self, value: Any) -> bool:
        """Whether that very value is there."""
        try:
            found: bool = self.get(type(value), value.name) == value
        except NotFoundError:
            return False
        return found

    def listing(
        self,
        kind: type[T],
        conditions: tuple[Condition, ...] = (),
        **equals: Any,
    ) -> ModelListing[T]:
        """The visible values that fulfil conditions and whose columns equal those given.

        None is given for any. A column that names another value takes that value or its name, and
        `train_name` may be a pattern.

        Raises:
            InvalidArgumentError: What is given for a column is neither text nor such a value.
            NotFoundError: It names a value that neither is there nor has any of the listed.
        """
        given = {
            column: self._name(column, value) if column in _REFERENCES else value
            for column, value in equals.items()
            if value is not None
        }
        columns = tuple(
            OnColumn(name, _operator(name, value), value) for name, value in given.items()
        )
        rows = ModelRows(self._database, kind, (*columns, *conditions))
        if not rows.numbers(1):
            for column in given.keys() & _REFERENCES.keys():
                self._refuse_unknown(kind, column, given[column])
        return ModelListing(kind.__name__, _COLUMNS[kind], rows)

    def _name(self, column: str, value: object) -> str:
        """The name of what a column refers to, given by itself, its name or an alias."""
        name = arguments.name_of(column, value, *_REFERENCES[column])
        if "@" not in name:  # it need not exist any more
            return name
        meant: str = self.meant(column, name, *_REFERENCES[column]).name
        return meant

    def _refuse_unknown(self, kind: type[Any], column: str, name: str) -> None:
        """An empty list answers a question about what there is, and not a mistyped name."""
        with self._database.read() as connection:
            if names(connection, TABLES[kind], **{column: name}):
                return
            referred = _REFERENCES[column]
            if not any(find_row(connection, TABLES[k], name=name) is not None for k in referred):
                required(connection, referred[0], name)  # raises, with the nearest name

    def newest(self, kind: type[T], limit: int, **equals: Any) -> list[T]:
        """The newest visible values whose columns equal these; damaged rows are left out."""
        table = TABLES[kind]
        query = select(table).where(
            table.c.stage == VISIBLE, *(table.c[key] == value for key, value in equals.items())
        )
        rows = self._database.rows(query.order_by(table.c.seq.desc()).limit(limit))
        found = [value_or_error(kind, row) for row in rows]
        return [value for value in found if not isinstance(value, IntegrityError)]

    def settled(self, connection: Connection, kind: type[T], **equals: Any) -> list[T]:
        """The values whose columns equal these, newest first.

        Raises:
            InUseError: One of them is being made or deleted.
        """
        table = TABLES[kind]
        query = select(table).where(*(table.c[key] == value for key, value in equals.items()))
        rows = connection.execute(query.order_by(table.c.seq.desc())).mappings().all()
        for row in rows:
            if row.get("stage", VISIBLE) != VISIBLE:
                raise InUseError(f"{row['name']} is being {_DOING[row['stage']]}")
        return [value_of(kind, row) for row in rows]

    def add_once(self, value: T) -> T:
        """Add a value that is nothing but a row; adding the same again is fine.

        Raises:
            AlreadyExistsError: Another value of its class has that name.
        """
        kind: Any = type(value)
        with self._database.write() as connection:
            known = find_row(connection, TABLES[kind], name=value.name)
            if known is None:
                insert_value(connection, value)
            elif (other := value_of(kind, known)) != value:
                way_out = "delete it first"
                if isinstance(value, DeploymentEnvironment):
                    way_out = "change it with ModelRegistry.update_environment"
                raise AlreadyExistsError(
                    f"{kind.__name__} {shown(other.name)} exists with {differences(other, value)}; "
                    f"{way_out}, or choose another name"
                )
        return value

    def delete(self, value: Any) -> None:
        """Remove a value that is nothing but a row.

        Raises:
            NotFoundError: It is not there.
            InUseError: Naming what still needs it.
        """
        if isinstance(value, BaseModel):
            self._leases.wait_for_other_hosts([value.key])
        with self._database.write() as connection:
            row = required(connection, type(value), value.name)
            self._refuse_while_needed(connection, value, row)
            _forget(connection, value_of(type(value), row))
            remove_row(connection, TABLES[type(value)], value.name)

    def restore(self, connection: Connection, value: Any, **columns: Any) -> bool:
        """Make the row of a value that has none, or a damaged one; False if it has a sound one."""
        kind: Any = type(value)
        row = find_row(connection, TABLES[kind], name=value.name)
        if row is not None and not isinstance(value_or_error(kind, row), IntegrityError):
            return False
        remove_row(connection, TABLES[kind], value.name)
        if kind in STAGED:
            columns |= {"stage": VISIBLE, "operation": ""}
        insert_value(connection, value, action="reindexed", **columns)
        return True

    # Changes that reach beyond the database

    def insert_pending(
        self, connection: Connection, value: Any, operation: str, **columns: Any
    ) -> None:
        """Say that `value` is about to be made; its name is taken from now on.

        Raises:
            AlreadyExistsError: The name is taken.
        """
        insert_value(connection, value, stage="pending", operation=operation, **columns)

    def make_visible(
        self, connection: Connection, value: Any, operation: str, **columns: Any
    ) -> None:
        """Say that `value` has been made.

        Raises:
            JobLost: Its row was taken over meanwhile.
        """
        self.change_pending(connection, value, operation, stage="visible", **columns)

    def mark_deleting(self, connection: Connection, value: Any, operation: str) -> None:
        """Say that a visible value is about to be removed: nobody sees it any more.

        Raises:
            NotFoundError: It is not there.
            InUseError: Naming what still needs it.
        """
        row = required(connection, type(value), value.name)
        if row["stage"] != "visible" and self._leases.holds(connection, row["operation"]):
            raise InUseError(f"{value.name} is being {_DOING[row['stage']]} by another process")
        self._refuse_while_needed(connection, value, row)
        if row["stage"] == VISIBLE:
            forget_metrics(connection, TABLES[type(value)], value.name)
            _forget(connection, value)
        table = TABLES[type(value)]
        change_row(connection, table, value.name, stage="deleting", operation=operation)

    def drop(self, connection: Connection, value: Any, operation: str) -> None:
        """Remove the row of what is no more, if it is this operation's; no error if not."""
        row = find_row(connection, TABLES[type(value)], name=value.name)
        if row is not None and row["operation"] == operation:
            remove_row(connection, TABLES[type(value)], value.name)

    def called(
        self, connection: Connection, served_name: str, environment: str, *, stage: str
    ) -> LiveModel | None:
        """The live model that has a served name at an environment, or that is about to have it.

        `stage`: "visible" or "pending".
        """
        table = TABLES[LiveModel]
        query = select(table).where(
            table.c.environment == environment, table.c.state == "live", table.c.stage == stage
        )
        every = [value_of(LiveModel, row) for row in connection.execute(query).mappings()]
        return next((live for live in every if live.served.name == served_name), None)

    def deployed_at(self, connection: Connection, environment: str) -> list[LiveModel]:
        """The visible live models that are at an environment."""
        table = TABLES[LiveModel]
        query = select(table).where(
            table.c.environment == environment,
            table.c.state.in_(DEPLOYED),
            table.c.stage == "visible",
        )
        return [value_of(LiveModel, row) for row in connection.execute(query).mappings()]

    def refuse_while_used(self, connection: Connection, environment: str) -> None:
        """Refuse if something is deployed at an environment, or on its way there.

        Raises:
            InUseError: Naming that, and the way out.
        """
        if of := [live.name for live in self.deployed_at(connection, environment)]:
            raise InUseError(
                f"{environment} still serves {listed(of)}; undeploy what is there, with "
                f"forget=True if the server is gone"
            )
        if of := names(connection, TABLES[LiveModel], environment=environment, stage="pending"):
            raise InUseError(
                f"on its way to {environment}: {listed(of)}. What a killed process has left of "
                f"that is taken back by Deployer.recover, with forget={environment!r} if the "
                f"server is gone"
            )

    def change_pending(
        self, connection: Connection, value: Any, operation: str, **columns: Any
    ) -> None:
        """Say more of a value that is about to be made.

        Raises:
            JobLost: Its row was taken over meanwhile.
        """
        row = find_row(connection, TABLES[type(value)], name=value.name)
        if row is None or (row["stage"], row["operation"]) != ("pending", operation):
            raise JobLost(f"{value.name} was given up while this process was stopped")
        update_value(connection, value, **columns)

    def put(
        self,
        connection: Connection,
        value: Any,
        *,
        action: Action = "changed",
        **columns: Any,
    ) -> None:
        """Put a changed value in place of the visible one of its name."""
        self.in_transaction(connection, type(value), value.name)
        update_value(connection, value, action=action, **columns)

    def follow(self, connection: Connection, live: LiveModel) -> None:
        """Let what third parties see of a live model say where it is now."""
        row = find_row(connection, TABLES[ThirdPartyModel], name=live.name)
        if row is not None:
            offered = value_of(ThirdPartyModel, row)
            update_value(
                connection,
                evolve(offered, endpoint=live.served.endpoint, environment=live.environment),
            )

    def supersede(self, connection: Connection, name: str) -> None:
        """Say that another has the served name of a live model; no error if it is live no more."""
        row = find_row(connection, TABLES[LiveModel], name=name, state="live")
        if row is not None:
            live = evolve(value_of(LiveModel, row), state="superseded")
            update_value(connection, live, state="superseded")

    def note_artifact(self, connection: Connection, live: LiveModel, key: str) -> None:
        """Say which file a pending live model will be served from."""
        change_row(connection, TABLES[LiveModel], live.name, artifact=key)

    def mark_undeployed(self, live: LiveModel) -> None:
        """Say that a live model is undeployed, and that what third parties see of it is stale."""
        with self._database.write() as connection:
            update_value(connection, live, state=live.state)
            row = find_row(connection, TABLES[ThirdPartyModel], name=live.name)
            if row is not None:
                offered = value_of(ThirdPartyModel, row)
                update_value(connection, evolve(offered, stale=True))

    def pending_at_a_tool(self, name: str) -> str | None:
        """The environment at which a live model of that name is pending; None if none is."""
        with self._database.read() as connection:
            row = find_row(connection, TABLES[LiveModel], name=name, stage="pending")
        return None if row is None else shown(row["environment"])

    def unfinished(self) -> list[Unfinished]:
        """The changes that nobody is about any more."""
        found = []
        with self._database.read() as connection:
            for kind in STAGED:
                table = TABLES[kind]
                query = select(table).where(table.c.stage != "visible").order_by(table.c.seq)
                for row in connection.execute(query).mappings().all():
                    if not self._leases.holds(connection, row["operation"]):
                        value = value_or_error(kind, row)
                        if not isinstance(value, IntegrityError):
                            artifact = row.get("artifact")
                            found.append(
                                Unfinished(value, row["stage"], row["operation"], artifact)
                            )
        return found

    def claim(self, connection: Connection, change: Unfinished, operation: str) -> bool:
        """Take over an unfinished change; False if someone else was faster."""
        table = TABLES[type(change.value)]
        row = find_row(connection, table, name=change.value.name)
        if row is None or (row["stage"], row["operation"]) != (change.stage, change.operation):
            return False
        change_row(connection, table, change.value.name, operation=operation)
        return True

    def refuse_while_served_from(self, connection: Connection, complete: CompleteModel) -> None:
        """Refuse if a tool serves the model from its stored directory.

        Raises:
            InUseError: Naming the live models.
        """
        table = TABLES[LiveModel]
        query = select(table).where(
            table.c.source == complete.name,
            table.c.state.in_(DEPLOYED),
            table.c.artifact.is_(None),
        )
        served = [value_of(LiveModel, row) for row in connection.execute(query).mappings()]
        if of := [live.name for live in served if not live.served.copied]:
            raise InUseError(f"{complete.name} is what {listed(of)} is served from")

    def refuse_to_delete(self, connection: Connection, value: Any) -> None:
        """Raise what deleting a value would raise.

        Raises:
            NotFoundError: It is not there.
            InUseError: Naming what still needs it.
        """
        row = required(connection, type(value), value.name)
        self._refuse_while_needed(connection, value, row)

    def _refuse_while_needed(self, connection: Connection, value: Any, row: Any) -> None:
        refuse_if_protected(connection, value)
        if isinstance(value, BaseModel | CustomizedModel | CompleteModel):
            self._leases.refuse_if_held(connection, value.key)
        if isinstance(value, BaseModel):
            of = names(connection, TABLES[CustomizedModel], base=value.name)
            if of:
                raise InUseError(f"{value.name} is the base of {listed(of)}")
        if isinstance(value, CustomizedModel):
            evicted = names(connection, TABLES[CompleteModel], customized=value.name, evicted=1)
            if evicted:
                raise InUseError(
                    f"{value.name} is what {listed(evicted)} would be rebuilt from, which was "
                    f"evicted; ModelRegistry.rebuild it first, or delete it"
                )
        if isinstance(value, DeploymentEnvironment):
            self.refuse_while_used(connection, value.name)
        if isinstance(value, LiveModel) and row["state"] in DEPLOYED:
            raise InUseError(f"{value.name} is deployed; Deployer.undeploy it first")


def _forget(connection: Connection, value: Any) -> None:
    """Let the log alone know of a value that is deleted, and of the base that it was made on."""
    known = {}
    if isinstance(value, CustomizedModel):
        base = find_row(connection, TABLES[BaseModel], name=value.base)
        with suppress(IntegrityError):  # its row is damaged
            known = {} if base is None else {"base_digest": value_of(BaseModel, base).digest}
    forget_labels(connection, value)
    record_deleted(connection, value, **known)


def _operator(column: str, value: str) -> Operator:
    return "glob" if column == "train_name" and is_pattern(value) else "=="


def _exists(connection: Connection, kind: type[Any], name: str) -> bool:
    with suppress(NotFoundError):
        named = name_meant(connection, kind, name)
        return find_row(connection, TABLES[kind], name=named) is not None
    return False


_REFERENCES: Mapping[str, tuple[type[Any], ...]] = {
    "base": (BaseModel,),
    "customized": (CustomizedModel,),
    "source": (CustomizedModel, CompleteModel),
    "environment": (DeploymentEnvironment,),
}
"""Columns that name a value of these classes."""

_COLUMNS: Mapping[type[Any], tuple[str, ...]] = {
    BaseModel: ("technical_name", "model_name", "card", "created"),
    CustomizedModel: ("base", "train_name", "card", "name", "created"),
    CompleteModel: ("base", "train_name", "card", "name", "created"),
    LiveModel: ("base", "train_name", "card", "name", "environment", "endpoint", "state"),
    ThirdPartyModel: ("name", "endpoint", "api", "model", "environment", "stale"),
    DeploymentEnvironment: ("name", "backend", "address", "port"),
}
"""What a list shows in a notebook, by class."""

_DOING = dict(zip(BEING_CHANGED, ("made", "deleted"), strict=True))
