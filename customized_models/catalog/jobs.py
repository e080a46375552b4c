"""Rows of jobs: what is to be made, how far it has come, how it ended.

A job of this host is done under its own lease, whose owner is the job's id. One that an executor
runs is done under a lease of its worker, `<id>.1`, `<id>.2` if that one is killed, and so on: a
worker that comes back after its lease has ended is not taken for the one that was begun since.
Beside that, its own lease is renewed by the process that submitted it, for as long as the executor
has it. A job is lost once nobody holds either lease. Workers that help with a save have leases of
their own, `<id>.h1`, `<id>.h2` and so on, each used once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Select, select

from ..errors import (
    AlreadyExistsError,
    CustomizedModelsError,
    IntegrityError,
    InUseError,
    JobCancelled,
    JobFailed,
    JobLost,
    NotFoundError,
    shown,
    to_record,
)
from ..processes import Process
from .database import Database
from .leases import Leases
from .rows import add_row, change_row, checked_row, find_row
from .schema import complete_models, jobs, live_models

RUNNING = ("queued", "running")
"""The states of a job that has not ended."""

WORKERS = 3
"""How many workers may be killed at a job that an executor runs, before it has failed.

A host that goes down takes a worker or two with it; what three have died of is the job.
"""

_HELPER = "h"  # what the number of a helper begins with, and that of no other worker

_WAIT = 0.1  # seconds for each job ahead: many that wait do not keep the database busy
_LONGEST_WAIT = 2.0

_DRAWS = 100  # of the 65,536 names that a model's saves can have


class Jobs:
    """The jobs of a registry."""

    def __init__(self, database: Database, leases: Leases) -> None:
        self._database = database
        self._leases = leases

    def add(
        self,
        kind: str,
        name: Callable[[uuid.UUID], str],
        arguments: Mapping[str, Any],
        holds: Iterable[str],
        max_running: int | None,
        process: Process | None = None,
    ) -> uuid.UUID:
        """Record a job, which holds `holds` from now on; returns its id.

        Args:
            kind: Of the job.
            name: Gives for an id the name of the model that the job makes; if it is taken,
                another id is drawn.
            arguments: All that the work depends on, as JSON can hold it.
            holds: What must not be deleted while it runs.
            max_running: It waits while as many jobs of the registry run or wait before it. None if
                an executor runs it, which lets jobs wait for each other as it likes.
            process: The one whose end is the job's, until its worker begins; this one if None.
        """
        with self._database.write() as connection:
            id = self._free_id(connection, name)
            add_row(
                connection,
                jobs,
                id=str(id),
                kind=kind,
                name=name(id),
                state="queued",
                arguments=json.dumps(arguments),
                phase="waiting",
                done=0,
                total=0,
                cancel=0,
                max_running=max_running,
                created=_now(),
            )
            keys = (f"job/{id}", *holds)
            self._leases.take(connection, str(id), keys, f"{kind} {name(id)}", process)
        return id

    @staticmethod
    def _free_id(connection: Connection, name: Callable[[uuid.UUID], str]) -> uuid.UUID:
        for _ in range(_DRAWS):
            id = uuid.uuid4()
            tables = (jobs, complete_models, live_models)
            if all(find_row(connection, table, name=name(id)) is None for table in tables):
                return id
        raise AlreadyExistsError(f"no free name like {shown(name(id))}")

    def row(self, id: str) -> Mapping[str, Any]:
        """A job's columns; its state is "lost" if its worker has gone without a word.

        Raises:
            NotFoundError: There is no such job.
            IntegrityError: The row is damaged.
        """
        row = self.rows([id]).get(id)
        if row is None:
            raise NotFoundError(f"no job {id}")
        if isinstance(row, IntegrityError):
            raise row
        return row

    def rows(self, ids: Iterable[str]) -> dict[str, Mapping[str, Any] | IntegrityError]:
        """As `row` for several, by id; those that are not there are left out."""
        return self._load("id", ids)

    def numbered(self, numbers: Iterable[int]) -> dict[int, Mapping[str, Any] | IntegrityError]:
        """As `row` for several, by their numbers."""
        return self._load("seq", numbers)

    def numbers(self, state: str | None, limit: int | None) -> list[int]:
        """The numbers of the jobs in a state, or of all, newest first."""
        rows, lost = self._seen(select(*_STANDING).order_by(jobs.c.seq.desc()))
        every = [
            row["seq"]
            for row in rows
            if state in (None, "lost" if row["id"] in lost else row["state"])
        ]
        return every[:limit]

    def _load(self, key: str, values: Iterable[Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        rows, lost = self._seen(select(jobs).where(jobs.c[key].in_(list(values))))
        for row in rows:
            try:
                found[row[key]] = dict(checked_row(jobs, row))
            except IntegrityError as error:
                found[row[key]] = error
            else:
                if row["id"] in lost:
                    found[row[key]]["state"] = "lost"
        return found

    def _seen(self, query: Select[Any]) -> tuple[list[Any], set[str]]:
        """The rows that a query finds, and the ids of those whose workers have gone without a word.

        Those are looked at twice: a worker may write down its end, and end, while a transaction
        that began before goes on to see the row as it was.
        """
        rows, lost = self._look(query)
        if lost:
            rows, still = self._look(query)
            lost &= still
        return rows, lost

    def _look(self, query: Select[Any]) -> tuple[list[Any], set[str]]:
        with self._database.read() as connection:
            rows = list(connection.execute(query).mappings())
            return rows, self._lost(connection, rows)

    def under_way(self, connection: Connection) -> list[Any]:
        """The rows of the jobs that wait or run, in a transaction that is open already."""
        query = select(jobs).where(jobs.c.state.in_(RUNNING)).order_by(jobs.c.seq)
        rows = list(connection.execute(query).mappings())
        lost = self._lost(connection, rows)
        return [row for row in rows if row["id"] not in lost]

    def _lost(self, connection: Connection, rows: Iterable[Any]) -> set[str]:
        """The ids of those of `rows` whose workers have gone without a word."""
        owners = {
            row["id"]: {row["id"], row["worker"]} - {None}
            for row in rows
            if row["state"] in RUNNING
        }
        held = self._leases.held(connection, set[str]().union(*owners.values()))
        return {id for id, of_it in owners.items() if not of_it & held}

    @staticmethod
    def error(row: Mapping[str, Any]) -> Mapping[str, Any]:
        """What ended a job, as `errors.from_record` takes it.

        Raises:
            IntegrityError: The row is damaged.
        """
        try:
            record: Mapping[str, Any] = json.loads(row["error"])
            record["classes"], record["message"], record["data"], record["notes"]
        except (TypeError, ValueError, KeyError) as error:
            raise IntegrityError(f"the row of job {row['id']} is damaged") from error
        return record

    def seconds_to_wait(self, id: str) -> float:
        """0 when it is a queued job's turn, else in how many seconds to ask again.

        Jobs begin in the order in which they were submitted, as soon as fewer than the job's
        `max_running` run or wait before it. Those whose workers are gone do not count, and one
        that was asked to stop need not wait for that. Those that executors run neither wait nor
        count.
        """
        of_hosts = jobs.c.max_running.is_not(None)
        query = select(*_STANDING).where(jobs.c.state.in_(RUNNING), of_hosts)
        with self._database.read() as connection:
            row = find_row(connection, jobs, id=id)
            if row is None or row["state"] != "queued" or row["cancel"]:
                return 0.0
            if row["max_running"] is None:
                return 0.0
            others = list(connection.execute(query).mappings())
            lost = self._lost(connection, others)
        ahead = sum(
            other["id"] not in lost and (other["seq"] < row["seq"] or other["state"] == "running")
            for other in others
        )
        return 0.0 if ahead < row["max_running"] else min(_WAIT * ahead, _LONGEST_WAIT)

    def take_up(
        self, id: str, holds: Iterable[str], process: Process | None, said: str
    ) -> str | None:
        """Let a worker of an executor begin a job; the owner of its lease, or None at the end.

        Where another worker is about a job that several share, this one helps it.

        Whoever submitted the job may be gone, and its lease have ended: what the job needs is held
        again. After as many workers as `WORKERS` says it is not begun again, and has failed. A
        deployment has one worker: no lease keeps one that comes back from the deployment tool.

        Args:
            id: The job's.
            holds: What must not be deleted while the worker is about it.
            process: The one whose end is the worker's, until that has begun.
            said: The end of what workers have printed here, for the error.

        Raises:
            InUseError: Another worker is about it.
        """
        with self._database.write() as connection:
            row = find_row(connection, jobs, id=id)
            if row is None or row["state"] not in RUNNING:
                return None
            before = self.workers_of(checked_row(jobs, row))
            what = f"{row['kind']} of {row['name']}"
            if self._has_worker(connection, row):
                owner = self._next_helper(connection, row)
                if owner is None:
                    raise InUseError(f"another worker is about the {what}")
                keys = (f"job/{id}", *holds)
                self._leases.take(connection, owner, keys, f"a part of the {what}", process)
                return owner
            if before and row["kind"] == "deploy":
                self.end(connection, id, "lost")
                return None
            if len(before) >= WORKERS:
                output = f"; the end of their output: {shown(said, 2000)}" if said else ""
                error = JobFailed(f"{len(before)} workers were killed at the {what}{output}")
                self.end(connection, id, "failed", error)
                return None
            owner = f"{id}.{len(before) + 1}"
            for ended in before:
                self._leases.end(connection, ended)
            self._leases.take(connection, owner, (f"job/{id}", *holds), what, process)
            change_row(connection, jobs, row["name"], state="queued", phase="waiting", worker=owner)
        return owner

    def _next_helper(self, connection: Connection, row: Any) -> str | None:
        """The owner of one more helper's lease; None if a job has had all that it may have.

        As many of each may be killed as of the workers that do the job.
        """
        arguments = json.loads(row["arguments"])
        begun = len(self.helpers_of(row))
        if begun >= (arguments.get("workers", 1) - 1) * WORKERS:
            return None
        arguments["helpers"] = begun + 1
        change_row(connection, jobs, row["name"], arguments=json.dumps(arguments))
        return f"{row['id']}.{_HELPER}{begun + 1}"

    def follow(self, id: str) -> bool:
        """Whether a worker is about a job, for one that helps it.

        Raises:
            JobCancelled: The job has ended, or is to stop.
        """
        with self._database.read() as connection:
            row = find_row(connection, jobs, id=id)
            if row is None or row["cancel"] or row["state"] not in RUNNING:
                raise JobCancelled("the job has ended, or was cancelled")
            return self._has_worker(connection, row)

    def helpers(self, id: str) -> dict[str, bool]:
        """The owners of the leases of all helpers that a job has had, and whether they live."""
        with self._database.read() as connection:
            row = find_row(connection, jobs, id=id)
            owners = [] if row is None else self.helpers_of(row)
            held = self._leases.held(connection, owners)
        return {owner: owner in held for owner in owners}

    def _has_worker(self, connection: Connection, row: Any) -> bool:
        """Whether a worker of an executor is about the job, as far as is known."""
        return row["worker"] is not None and self._leases.holds(connection, row["worker"])

    def vouch(self, ids: Collection[str]) -> None:
        """Say that this process lives, which has submitted these jobs to an executor."""
        self._leases.renew_all(ids)

    def give_back(self, id: str, error: CustomizedModelsError) -> None:
        """Say that an executor has done with a job, which ends with `error` if it has not ended.

        A worker that is about it goes on: an engine may lose sight of one that lives.
        """
        with self._database.write() as connection:
            self._leases.end(connection, id)
            row = find_row(connection, jobs, id=id)
            if row is None or row["state"] not in RUNNING or self._has_worker(connection, row):
                return
            if row["cancel"]:
                self.end(connection, id, "cancelled")
            else:
                self.end(connection, id, "failed", error)

    def begin(self, id: str, owner: str | None = None) -> Mapping[str, Any] | None:
        """Say that the work is taken up here; the job's columns, or None if it has ended already.

        Args:
            id: The job's.
            owner: Of the lease that it is done under; the job's own if None.

        Raises:
            JobLost: That lease has ended.
        """
        with self._database.write() as connection:
            if not self._leases.holds(connection, owner or id):
                raise JobLost("the job's lease ended before its worker could begin")
            row = find_row(connection, jobs, id=id)
            if row is None or row["state"] != "queued":
                return None
            change_row(
                connection, jobs, row["name"], state="running", phase="starting", started=_now()
            )
        return dict(row)

    def report(self, id: str, phase: str, done: int, total: int) -> None:
        """Write down how far the work has come.

        Raises:
            JobCancelled: Someone asked the job to stop.
        """
        with self._database.write() as connection:
            row = find_row(connection, jobs, id=id)
            if row is None or row["cancel"]:
                raise JobCancelled("the job was cancelled")
            change_row(connection, jobs, row["name"], phase=phase, done=done, total=total)

    def ask_to_stop(self, id: str) -> bool:
        """Ask a job to stop; False if it has ended already.

        One that waits in an executor ends at once: it may be hours until that would say so.
        """
        with self._database.write() as connection:
            row = find_row(connection, jobs, id=id)
            if row is None or row["state"] not in RUNNING:
                return False
            if row["max_running"] is None and not self._has_worker(connection, row):
                self.end(connection, id, "cancelled")
            else:
                change_row(connection, jobs, row["name"], cancel=1)
        return True

    def end(
        self, connection: Connection, id: str, state: str, error: BaseException | None = None
    ) -> None:
        """End a job in the transaction that counts: once it is visible, its worker is done.

        Raises:
            JobLost: The job was given up meanwhile, by someone who saw its lease end.
        """
        row = find_row(connection, jobs, id=id)
        if row is None or row["state"] not in RUNNING:
            raise JobLost("the job was given up while its worker was stopped")
        record = None if error is None else json.dumps(to_record(error))
        change_row(connection, jobs, row["name"], **_ended(row, state), error=record)
        self._leases.end(connection, id)

    def give_up_saves_of(self, customized: str) -> list[str]:
        """The workers of saves of that customized model which have gone without a word.

        Each is given out once, by the owner of its lease, and cannot publish any more: what it
        left is the caller's.
        """
        under_way = select(jobs).where(jobs.c.kind == "save", jobs.c.state.in_(RUNNING))
        with self._database.write() as connection:
            rows = connection.execute(under_way).mappings().all()
            saves = [row for row in rows if _saves(row, customized)]
            lost = self._lost(connection, saves)
            given_up = [row for row in saves if row["id"] in lost]
            for row in given_up:
                change_row(connection, jobs, row["name"], **_ended(row, "lost"))
        return [
            owner for row in given_up for owner in (*self.workers_of(row), *self.helpers_of(row))
        ]

    @staticmethod
    def helpers_of(row: Any) -> list[str]:
        """The owners of the leases of all helpers that a job has had.

        Args:
            row: A job's columns, not damaged.
        """
        begun = json.loads(row["arguments"]).get("helpers", 0)
        return [f"{row['id']}.{_HELPER}{number}" for number in range(1, begun + 1)]

    @staticmethod
    def helper_number(owner: str) -> int:
        """Of the helper with that lease, from 1; 0 if it is that of another worker."""
        last = owner.rpartition(".")[2]
        return int(last.removeprefix(_HELPER)) if last.startswith(_HELPER) else 0

    @staticmethod
    def workers_of(row: Any) -> list[str]:
        """The owners of the leases of all workers that a job has had, the last one last.

        Args:
            row: A job's columns, not damaged.
        """
        if row["max_running"] is not None:
            return [row["id"]]
        last = int(row["worker"].rpartition(".")[2]) if row["worker"] else 0
        return [f"{row['id']}.{number}" for number in range(1, last + 1)]

    def finish_for(self, connection: Connection, name: str, state: str) -> None:
        """End the job that makes the model of that name, whose worker is gone."""
        row = find_row(connection, jobs, name=name)
        if row is not None and row["state"] in (*RUNNING, "lost"):
            change_row(connection, jobs, name, **_ended(row, state))
            self._leases.end(connection, row["id"])


_STANDING = (jobs.c.seq, jobs.c.id, jobs.c.state, jobs.c.worker)
"""What it takes to know how a job stands."""


def _saves(row: Any, customized: str) -> bool:
    """Whether a job is the save of that model; a damaged row is of no model."""
    try:
        arguments = json.loads(checked_row(jobs, row)["arguments"])
    except IntegrityError:
        return False
    return bool(arguments["customized"] == customized)


def _ended(row: Any, state: str) -> dict[str, Any]:
    """The columns of a job that has ended; all of one that has succeeded is done."""
    columns = {"state": state, "ended": _now()}
    return columns | {"phase": "done", "done": row["total"]} if state == "succeeded" else columns


def _now() -> str:
    return datetime.now(UTC).isoformat()
