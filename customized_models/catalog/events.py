"""The event log: rows that are only ever added, each in the transaction of the change it tells."""

from __future__ import annotations

import functools
import getpass
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from attrs import frozen
from sqlalchemy import Connection, Select, and_, func, insert, select

from ..errors import IntegrityError, shown
from ..files.digests import canonical_json
from ..files.documents import to_document
from ..history import Action, Event
from ..search import OnColumn
from .database import Database
from .listing import Listing
from .schema import event_subjects, events

_COLUMNS = ("number", "time", "who", "action", "kind", "name")


def record(
    connection: Connection,
    action: Action,
    kind: type[Any],
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    about: Sequence[str] = (),
) -> None:
    """Write down what this transaction does.

    Args:
        connection: The transaction's.
        action: What it does.
        kind: The class of what it does it to.
        name: Its name.
        before: What it was.
        after: What it is.
        about: Further names under which the event is found.
    """
    added = connection.execute(
        insert(events).values(
            time=time.time(),
            who=_who(),
            action=action,
            kind=kind.__name__,
            name=name,
            before=canonical_json(before).decode(),
            after=canonical_json(after).decode(),
        )
    )
    (number,) = added.inserted_primary_key or (None,)
    rows = [{"subject": subject, "event": number} for subject in {name, *about}]
    connection.execute(insert(event_subjects), rows)


def record_created(connection: Connection, action: Action, value: Any) -> None:
    """Write down that a value is there now: its digest, or all of what has none."""
    digest = getattr(value, "digest", None)
    after = to_document(value) if digest is None else {"digest": digest}
    record(connection, action, type(value), value.name, {}, after)


def record_changed(connection: Connection, action: Action, old: Any, new: Any) -> None:
    """Write down which fields of a value are others now, if any is."""
    before, after = to_document(old), to_document(new)
    changed = [key for key in after if before.get(key) != after[key]]
    if changed:
        record(
            connection,
            action,
            type(new),
            new.name,
            {key: before.get(key) for key in changed},
            {key: after[key] for key in changed},
        )


def record_deleted(connection: Connection, value: Any, **known: Any) -> None:
    """Write down that a value is gone, all that it was, and what else is known of it by fields.

    See `Events.tombstone`.
    """
    record(connection, "deleted", type(value), value.name, to_document(value) | known, {})


class Events:
    """The events of a registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def listing(
        self,
        about: str | None,
        kind: type[Any] | None,
        action: str | None,
        moments: tuple[OnColumn, ...],
    ) -> Listing[Event]:
        """Events, newest first: about a name, of a class, of an action, within a span of time."""
        query = select(events.c.seq)
        if about is not None:
            query = query.join(
                event_subjects,
                and_(event_subjects.c.event == events.c.seq, event_subjects.c.subject == about),
            )
        if kind is not None:
            query = query.where(events.c.kind == kind.__name__)
        if action is not None:
            query = query.where(events.c.action == action)
        for moment in moments:
            at, bound = events.c.time, moment.value
            query = query.where(at >= bound if moment.operator == ">=" else at < bound)
        return Listing("Event", _COLUMNS, _EventRows(self._database, query))

    def newest(self) -> int:
        """The number of the last event; 0 if there is none."""
        return _EventRows(self._database, select(events.c.seq)).newest()

    def newer(self, number: int) -> list[Event]:
        """The events after that number, oldest first; those that nobody can read are left out."""
        return self._readable(select(events).where(events.c.seq > number).order_by(events.c.seq))

    def tombstone(self, kind: type[Any], name: str, digest: str) -> Event | None:
        """The deletion of a value, which knows all that it was; None if none was deleted here."""
        query = (
            select(events)
            .join(event_subjects, event_subjects.c.event == events.c.seq)
            .where(
                event_subjects.c.subject == name,
                events.c.action == "deleted",
                events.c.kind == kind.__name__,
            )
            .order_by(events.c.seq.desc())
        )
        for event in self._readable(query):
            if digest in ("", event.before.get("digest")):
                return event
        return None

    def _readable(self, query: Select[Any]) -> list[Event]:
        """The events that a query finds, but for damaged ones and those of a newer version."""
        read = map(_event_or_error, self._database.rows(query))
        return [event for event in read if isinstance(event, Event)]


@frozen
class _EventRows:
    """The events that a query finds; see `listing.Rows`."""

    database: Database
    query: Select[Any]

    def numbers(self, limit: int | None = None, offset: int = 0) -> list[int]:
        """See `listing.Rows`."""
        query = self.query.order_by(events.c.seq.desc()).limit(limit).offset(offset or None)
        return [row["seq"] for row in self.database.rows(query)]

    def count(self) -> int:
        """See `listing.Rows`."""
        (row,) = self.database.rows(
            select(func.count().label("n")).select_from(self.query.subquery())
        )
        count: int = row["n"]
        return count

    def newest(self) -> int:
        """See `listing.Rows`."""
        (row,) = self.database.rows(select(func.max(events.c.seq).label("newest")))
        return row["newest"] or 0

    def load(self, numbers: Sequence[int]) -> Mapping[int, Event | IntegrityError]:
        """See `listing.Rows`."""
        rows = self.database.rows(select(events).where(events.c.seq.in_(numbers)))
        return {row["seq"]: _event_or_error(row) for row in rows}


def _event(row: Any) -> Event:
    return Event(
        number=row["seq"],
        time=datetime.fromtimestamp(row["time"], UTC),
        who=row["who"],
        action=row["action"],
        kind=row["kind"],
        name=row["name"],
        before=json.loads(row["before"]),
        after=json.loads(row["after"]),
    )


def _event_or_error(row: Any) -> Event | IntegrityError:
    try:
        return _event(row)
    except (TypeError, ValueError, OverflowError) as error:
        return IntegrityError(f"event {row['seq']} is damaged: {shown(error)}")


@functools.cache
def _who() -> str:
    """The user and the host; the user's number where it has no name, as in some containers."""
    user = str(os.getuid())
    with suppress(KeyError, OSError, ImportError):
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"
