"""Leases: what a process holds must not be deleted while it lives and renews its hold.

A lease's row says which process holds it, and when that process last renewed it. Processes of the
same host see whether it runs.

A server of PostgreSQL's has one clock for all. With SQLite no clocks need to agree: the time is
that of the host's own monotonic clock, which processes of the host read as well; those of other
hosts see whether the row changes while they watch it for as long as a lease lasts.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Collection, Iterable
from typing import Any

from attrs import asdict, frozen
from sqlalchemy import Connection, delete, select, update

from ..errors import DatabaseError, IntegrityError, InUseError, JobLost, LeaseLostError, shown
from ..processes import Process, host_id
from .database import Database
from .rows import add_row
from .schema import leases

LEASE_SECONDS = 60.0  # twice what a process may wait for the database
BEGIN_SECONDS = 600.0  # in which a process has imported torch, even from a slow network's disk
RENEWAL_SECONDS = LEASE_SECONDS / 6  # a few may fail before the lease is lost
WATCH_SECONDS = 1.0  # between two looks at another host's lease

COPY_KEY = "registry/copy"
"""What is held in a registry that another one is copied into."""


@frozen
class Holder:
    """Who holds a key, as its row says."""

    owner: str
    purpose: str
    process: Process
    renewed: float

    @classmethod
    def of(cls, row: Any) -> Holder:
        """The holder that a row names.

        Raises:
            IntegrityError: The row is damaged.
        """
        try:
            process = Process(**json.loads(row["process"]))
            return cls(row["owner"], row["purpose"], process, float(row["renewed"]))
        except (TypeError, ValueError) as error:
            raise IntegrityError(
                f"the lease of {shown(row['owner'])} on {shown(row['key'])} is damaged: "
                f"{shown(error)}; ModelRegistry.gc() removes it"
            ) from error


class Leases:
    """The leases of a registry."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._watched: dict[str, tuple[float, float]] = {}  # owner: last renewal, seen since

    def take(
        self,
        connection: Connection,
        owner: str,
        keys: Iterable[str],
        purpose: str,
        process: Process | None = None,
    ) -> None:
        """Hold `keys`, so that `refuse_if_held` refuses them to others.

        Args:
            connection: Of the transaction.
            owner: Who holds them.
            keys: What to hold.
            purpose: What for.
            process: Whose end is that of the hold, and who is going to renew it, once it has begun
                with that; this process if None.
        """
        for key in keys:
            self.end(connection, owner, key)
            add_row(
                connection,
                leases,
                owner=owner,
                key=key,
                purpose=purpose,
                **self._now(connection, process),
            )

    def end(self, connection: Connection, owner: str, key: str | None = None) -> None:
        """Release what `owner` holds: one key, or everything."""
        held = delete(leases).where(leases.c.owner == owner)
        connection.execute(held if key is None else held.where(leases.c.key == key))

    def renew(self, owner: str) -> bool:
        """Say that `owner` still lives, and that it is this process; False if its lease is lost.

        A lease that has ended stays so, though nobody may have taken its keys yet: others have
        seen that it ended.
        """
        return owner in self.renew_all([owner])

    def renew_all(self, owners: Collection[str]) -> set[str]:
        """As `renew` for several, in one transaction; those whose leases last."""
        with self._database.write() as connection:
            held = self.held(connection, owners)
            theirs = update(leases).where(leases.c.owner.in_(held))
            connection.execute(theirs.values(**self._now(connection)))
        return held

    def holds(self, connection: Connection, owner: str) -> bool:
        """Whether the lease of `owner` lasts, as far as is known without waiting."""
        return owner in self.held(connection, [owner])

    def held(self, connection: Connection, owners: Collection[str]) -> set[str]:
        """Those of `owners` whose leases last, as `holds` says of one."""
        query = select(leases).where(leases.c.owner.in_(owners))
        rows = {row["owner"]: row for row in connection.execute(query).mappings().all()}
        return set(rows) - self._ended(connection, rows.values())

    def refuse_if_held(self, connection: Connection, key: str, *, but: str = "") -> None:
        """Raise `InUseError` if anyone holds `key`; take it from those whose lease has ended.

        Args:
            connection: Of the transaction.
            key: What is asked for.
            but: An owner who may hold it.
        """
        holding = select(leases).where(leases.c.key == key, leases.c.owner != but)
        for row in connection.execute(holding).mappings().all():
            holder = Holder.of(row)
            if not self._has_ended(holder, self._database.clock(connection)):
                raise InUseError(f"{shown(key)} is in use by {holder.purpose}")
            self.end(connection, holder.owner, key)

    def refuse_during_copy(self, connection: Connection) -> None:
        """Raise `InUseError` while another registry is copied into this one."""
        self.refuse_if_held(connection, COPY_KEY)

    def forget_ended(self, connection: Connection) -> None:
        """Remove the rows of leases that have ended."""
        for owner in self._ended(connection, connection.execute(select(leases)).mappings().all()):
            self.end(connection, owner)

    def wait_for_other_hosts(self, keys: Iterable[str]) -> None:
        """Watch those of `keys` that other hosts hold, until each is seen to be renewed or ended.

        That takes as long as a lease lasts at most, and one of theirs is renewed long before. To be
        called before a transaction that asks `refuse_if_held`; where no other host holds anything,
        or all have one clock, it costs nothing.
        """
        if self._database.has_clock:
            return
        wanted, until = set(keys), time.monotonic() + LEASE_SECONDS + WATCH_SECONDS
        first: dict[str, float] = {}
        while time.monotonic() < until:
            with self._database.read() as connection:
                query = select(leases).where(leases.c.key.in_(wanted))
                every = list(map(Holder.of, connection.execute(query).mappings()))
                others = [holder for holder in every if holder.process.host != host_id()]
                now = self._database.clock(connection)
                ended = [self._has_ended(holder, now) for holder in others]
            renewed = any(first.setdefault(h.owner, h.renewed) != h.renewed for h in others)
            if renewed or all(ended):
                return
            time.sleep(WATCH_SECONDS)

    def _ended(self, connection: Connection, rows: Collection[Any]) -> set[str]:
        """The owners of those rows whose leases have ended.

        Nobody holds anything by a row that is damaged, and others go on.
        """
        now = self._database.clock(connection) if rows else 0.0
        ended = set()
        for row in rows:
            try:
                if not self._has_ended(Holder.of(row), now):
                    continue
            except IntegrityError:
                pass
            ended.add(row["owner"])
        return ended

    def _has_ended(self, holder: Holder, now: float) -> bool:
        if self._database.has_clock or holder.process.host == host_id():
            late = now - holder.renewed > LEASE_SECONDS
            return late or holder.process.is_gone
        renewed, since = self._watched.get(holder.owner, (None, 0.0))
        if renewed != holder.renewed:
            self._watched[holder.owner] = holder.renewed, time.monotonic()
            return False
        return time.monotonic() - since > LEASE_SECONDS

    def _now(self, connection: Connection, holder: Process | None = None) -> dict[str, Any]:
        """Who renews a lease, and when: the columns of its row."""
        process = json.dumps(asdict(holder or Process.current()), sort_keys=True)
        ahead = 0.0 if holder is None else BEGIN_SECONDS - LEASE_SECONDS
        renewed = self._database.clock(connection) + ahead
        return {"process": process, "renewed": renewed}


class Lease:
    """A hold of this process on some keys, renewed from a thread while the block lasts.

    Args:
        leases: Those of the registry.
        owner: One whose keys were taken already, as a job's are by who started it; else drawn.

    Attributes:
        owner: Whose keys they are.
        lost: Set when the lease could not be renewed in time: its keys may have been deleted.

    Raises:
        LeaseLostError: At the end of the block, if the lease was lost meanwhile.
    """

    def __init__(self, leases: Leases, database: Database, owner: str | None = None) -> None:
        self.owner = owner or uuid.uuid4().hex
        self.lost = threading.Event()
        self._leases = leases
        self._database = database
        self._held = owner is not None
        self._process = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._renewed = time.monotonic()

    def __enter__(self) -> Lease:
        if self._held and not self._leases.renew(self.owner):
            self.lost.set()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if os.getpid() != self._process:
            return  # a fork of the process that holds it, and goes on
        self._stop.set()
        self._thread.join()
        if not self._held:
            return
        with self._database.write() as connection:
            held = self._leases.holds(connection, self.owner)
            self._leases.end(connection, self.owner)
        if error is None and not held:
            self.lost.set()
            raise LeaseLostError(_LOST)
        if error is not None and self.lost.is_set():
            error.add_note(_LOST)

    def take(self, connection: Connection, keys: Iterable[str], purpose: str) -> None:
        """Hold `keys`, once the transaction is committed."""
        self._leases.take(connection, self.owner, keys, purpose)
        self._held = True

    def end(self, connection: Connection) -> None:
        """Release in the transaction that counts, so that nothing is left to do after it."""
        self._leases.end(connection, self.owner)
        self._held = False

    def check(self, connection: Connection) -> None:
        """Raise `JobLost` unless the lease still holds: call it in the transaction that counts."""
        if not self._leases.holds(connection, self.owner):
            raise JobLost("this process was stopped for longer than its lease; nothing was changed")

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL_SECONDS):
            try:
                renewed = not self._held or self._leases.renew(self.owner)
            except DatabaseError:  # busy or out of reach: the next round may succeed
                renewed = time.monotonic() - self._renewed < LEASE_SECONDS
            else:
                self._renewed = time.monotonic()
            if not renewed:
                self.lost.set()
                return


_LOST = (
    f"this process could not renew its hold for {LEASE_SECONDS:.0f} seconds, so what it held may "
    f"have been deleted meanwhile: what was read of it is not to be relied on"
)
