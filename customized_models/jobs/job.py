"""`Job`: the handle of work in the background.

Everything a job needs is in its row, so it outlives the process that started it, and any process
that opens the registry can watch, await or cancel it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import ExitStack, aclosing
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from attrs import fields

from ..arguments import seconds, truth
from ..display import html_table
from ..errors import (
    CustomizedModelsError,
    JobCancelled,
    JobLost,
    JobTimeoutError,
    from_record,
    shown,
)
from ..models import CompleteModel, JobProgress, JobRecord, JobState, LiveModel
from .bar import Bar
from .executors import withdraw
from .watching import changes
from .workers import Worker

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

RESULT_TYPES: Mapping[str, type[Any]] = {
    "save": CompleteModel,
    "rebuild": CompleteModel,
    "deploy": LiveModel,
}
"""The class of the model that each kind of job makes; an "export" gives the path of a file."""

_RUNNING = ("queued", "running")

workers: dict[str, Worker] = {}
"""The workers that this process has started, by the ids of their jobs."""


class Job(Generic[T_co]):
    """A save, a rebuild or a deployment that waits, is under way, or is over.

    Jobs of a registry begin in the order in which they were submitted, `max_running` at a time;
    those of an executor, as it has it.

    >>> complete = merger.save(customized).result()          # doctest: +SKIP
    >>> complete = await merger.save(customized)             # doctest: +SKIP
    >>> async for progress in job:                           # doctest: +SKIP
    ...     print(progress)

    Attributes:
        id: Its id; `ModelRegistry.job(id)` finds it again.
        kind: "save", "rebuild", "deploy" or "export".
        name: Of the model that it makes.
        created: When it was submitted.
    """

    def __init__(self, catalog: Catalog, log: Path, row: Mapping[str, Any]) -> None:
        self._catalog = catalog
        self._log = log
        self.id = uuid.UUID(row["id"])
        self.kind: str = row["kind"]
        self.name: str = json.loads(row["arguments"]).get("rebuilds", row["name"])
        self.created = datetime.fromisoformat(row["created"])

    def __repr__(self) -> str:
        return f"<Job {self.kind} {self.name} {self.state}>"

    def _repr_html_(self) -> str:
        record = self.record
        return html_table(
            ("job", "makes", "state", "progress", "created"),
            [(self.kind, self.name, record.state, record.progress, self.created)],
        )

    @property
    def record(self) -> JobRecord:
        """All that is known of it now."""
        row = self._row()
        error = self._error(row)
        return JobRecord(
            id=self.id,
            kind=self.kind,
            name=self.name,
            state=row["state"],
            progress=_progress(row),
            created=self.created,
            started=_time(row["started"]),
            ended=_time(row["ended"]),
            error=None if error is None else f"{type(error).__name__}: {error}",
        )

    @property
    def state(self) -> JobState:
        """How it stands now; "lost" when its worker has gone without a word."""
        state: JobState = self._row()["state"]
        return state

    @property
    def progress(self) -> JobProgress:
        """What it is doing, and how much of how much is done."""
        return _progress(self._row())

    @property
    def started(self) -> datetime | None:
        """When its work began; None while it waits."""
        return _time(self._row()["started"])

    @property
    def ended(self) -> datetime | None:
        """When it ended; None if it has not, or is lost."""
        return _time(self._row()["ended"])

    @property
    def error(self) -> CustomizedModelsError | None:
        """What `result` raises; None while it is under way, and if it succeeded."""
        return self._error(self._row())

    @property
    def log(self) -> str:
        """What its worker has printed and logged so far, on this host; kept until `gc`."""
        return self._log.read_text(errors="replace") if self._log.is_file() else ""

    def to_dict(self) -> dict[str, Any]:
        """All that is known of it now, as JSON can hold it."""
        return self.record.to_dict()

    def keys(self) -> tuple[str, ...]:
        """The names of the fields of its record; with them, `dict(job)` works."""
        return tuple(a.name for a in fields(JobRecord))

    def __getitem__(self, field: str) -> Any:
        return self.record[field]

    def result(self, timeout: float | None = None, *, progress: bool = True) -> T_co:
        """Wait for the model it makes; shows a progress bar unless told not to.

        Args:
            timeout: Seconds.
            progress: Whether to show a bar.

        Raises:
            JobTimeoutError: `timeout` elapsed; the job keeps running.
            JobCancelled: It was cancelled.
            JobLost: Its worker is gone.
            JobFailed: Its worker met an unexpected error.
            CustomizedModelsError: Whatever of our errors ended it, with its class and attributes.
        """
        span = None if timeout is None else seconds("timeout", timeout)
        deadline = None if span is None else time.monotonic() + span
        told, database = Event(), self._catalog.database
        with Bar(self.name, shown=truth("progress", progress)) as bar, database.telling(told):
            while (row := self._row())["state"] in _RUNNING:
                bar.update(row["phase"], row["done"], row["total"])
                if deadline is not None and time.monotonic() > deadline:
                    raise JobTimeoutError(
                        f"{self.kind} of {self.name} still runs after {timeout} seconds"
                    )
                self._pause(told, deadline)
            done = row["total"] if row["state"] == "succeeded" else row["done"]
            bar.update(row["phase"], done, row["total"])
        return self._outcome(row)

    def _pause(self, told: Event, deadline: float | None) -> None:
        """Wait until the next look: until told, until the worker has ended, or as is usual."""
        span = _span(self._catalog.database.poll_seconds, deadline)
        worker = workers.get(str(self.id))
        if worker is not None:
            worker.wait(span)
        elif told.wait(span):
            told.clear()

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        async with aclosing(self._rows()) as rows:
            async for row in rows:
                last = row
        return await asyncio.to_thread(self._outcome, last)

    async def __aiter__(self) -> AsyncIterator[JobProgress]:
        """How far it has come, now and at every change, until it has ended; `await` tells how."""
        async with aclosing(self._rows()) as rows:
            async for row in rows:
                yield _progress(row)

    async def _rows(self) -> AsyncGenerator[Mapping[str, Any]]:
        """Its row at every change, until it has ended; nothing here blocks the event loop."""
        id, database = str(self.id), self._catalog.database
        async with aclosing(changes(database, partial(_look, self._catalog), id)) as rows:
            async for row in rows:
                yield row
                if row["state"] not in _RUNNING:
                    return

    def cancel(self) -> bool:
        """Ask it to stop; False if it has ended already.

        It stops before its next tensor and leaves nothing behind. If it was just publishing, it
        may still succeed: `result` tells. One that waits in an executor ends at once.
        """
        asked = self._catalog.jobs.ask_to_stop(str(self.id))
        withdraw(self._catalog, str(self.id))
        return asked

    def _row(self) -> Mapping[str, Any]:
        _reap(self._catalog, str(self.id))
        return self._catalog.jobs.row(str(self.id))

    def _outcome(self, row: Mapping[str, Any]) -> T_co:
        error = self._error(row)
        if error is not None:
            raise error
        result: Any
        if self.kind in RESULT_TYPES:
            result = self._catalog.levels.get(RESULT_TYPES[self.kind], self.name)
        else:  # an export
            result = Path(json.loads(row["arguments"])["path"])
        made: T_co = result
        return made

    def _error(self, row: Mapping[str, Any]) -> CustomizedModelsError | None:
        match row["state"]:
            case "failed":
                return from_record(self._catalog.jobs.error(row))
            case "cancelled":
                return JobCancelled(f"{self.kind} of {self.name} was cancelled")
            case "lost":
                return JobLost(self._lost(row))
        return None

    def _lost(self, row: Mapping[str, Any]) -> str:
        left = self._catalog.levels.pending_at_a_tool(self.name)
        what = (
            f"what it was deploying may be left at {left}; ModelRegistry.recover() removes it"
            if left
            else "nothing was published"
        )
        tail = self.log[-2000:]
        said = f"; the end of its output: {shown(tail, 2000)}" if tail else ""
        not_begun = row["max_running"] is None and row["worker"] is None
        who = "the process that submitted" if not_begun else "the worker of"
        return f"{who} {self.kind} {self.name} is gone; {what}{said}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """For web services: a job answers with its record."""
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(
            cls,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda job: job.record, return_schema=handler.generate_schema(JobRecord)
            ),
        )


def as_completed(jobs: Iterable[Job[T]], timeout: float | None = None) -> Iterator[Job[T]]:
    """The jobs in the order in which they end, however they do; `result` of each tells how.

    As `concurrent.futures.as_completed` does for futures.

    >>> for job in as_completed(merger.save_many(customized_models)):      # doctest: +SKIP
    ...     print(job.name, job.state)

    Args:
        jobs: Of any registries; each is yielded once.
        timeout: Seconds, from the first look on.

    Raises:
        JobTimeoutError: `timeout` elapsed; the jobs keep running.
    """
    span = None if timeout is None else seconds("timeout", timeout)
    waiting = {str(job.id): job for job in jobs}
    deadline = None if span is None else time.monotonic() + span
    catalogs = {job._catalog.database.url: job._catalog for job in waiting.values()}
    told = Event()
    with ExitStack() as stack:
        for catalog in catalogs.values():
            stack.enter_context(catalog.database.telling(told))
        while waiting:
            under_way = {
                id
                for catalog in catalogs.values()
                for id, row in _look(catalog, waiting).items()
                if not isinstance(row, Exception) and row["state"] in _RUNNING
            }
            for id in [id for id in waiting if id not in under_way]:
                yield waiting.pop(id)
            if waiting and deadline is not None and time.monotonic() > deadline:
                raise JobTimeoutError(f"{len(waiting)} jobs still run after {timeout} seconds")
            polls = (catalog.database.poll_seconds for catalog in catalogs.values())
            if waiting and told.wait(_span(min(polls), deadline)):
                told.clear()


def _span(poll: float, deadline: float | None) -> float:
    """For how many seconds to wait until the next look, of which one is due at the deadline."""
    return poll if deadline is None else max(0.0, min(poll, deadline - time.monotonic()))


def _look(catalog: Catalog, ids: Collection[str]) -> Mapping[str, Mapping[str, Any] | Exception]:
    """The rows of several jobs, by id."""
    for id in ids:
        _reap(catalog, id)
    return catalog.jobs.rows(ids)


def _reap(catalog: Catalog, id: str) -> None:
    """If the worker is our child and has ended, nobody need wait for its lease."""
    worker = workers.get(id)
    if worker is not None and worker.has_ended:
        workers.pop(id, None)  # another thread may have seen it too
        worker.close()
        with catalog.database.write() as connection:
            catalog.leases.end(connection, id)


def _progress(row: Mapping[str, Any]) -> JobProgress:
    return JobProgress(row["phase"], row["done"], row["total"])


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
