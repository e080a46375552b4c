"""Work in the background: its record, and the handle that waits for it.

A job runs in a fresh interpreter. Everything it needs is in its row, so it outlives the process
that started it, and any process that opens the registry can watch, await or cancel it.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .. import errors as _errors
from ..errors import (
    AlreadyExistsError,
    CustomizedModelsError,
    JobCancelled,
    JobFailed,
    JobLost,
    JobTimeoutError,
    NotFoundError,
    shown,
)
from ..models import CompleteModel, LiveModel, html_table
from .standby import command, start, start_ahead, take_started

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..catalog.database import Lease
    from ..registry import ModelRegistry

T_co = TypeVar("T_co", covariant=True)
State = Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"]
RUNNING = ("queued", "running")
POLL_SECONDS = 0.1

MAKES: Mapping[str, type[Any]] = {"save": CompleteModel, "deploy": LiveModel}
"""The class of what each kind of job makes."""

_children: dict[str, subprocess.Popen[bytes]] = {}  # by job id: the workers we started


class Job(Generic[T_co]):
    """A save or a deployment under way, or over.

    >>> complete = merger.save(customized).result()          # doctest: +SKIP
    >>> complete = await merger.save(customized)             # doctest: +SKIP
    """

    def __init__(self, registry: ModelRegistry, id: uuid.UUID) -> None:
        self._registry = registry
        self.id = id
        row = self._row()
        self.kind: str = row["kind"]
        self.name: str = row["name"]

    def __repr__(self) -> str:
        return f"<Job {self.kind} {self.name} {self.state}>"

    def _repr_html_(self) -> str:
        phase, done, total = self.progress
        share = f"{100 * done // total} %" if total else ""
        return html_table(
            ("job", "makes", "state", "phase", "done"),
            [(self.kind, self.name, self.state, phase, share)],
        )

    @property
    def state(self) -> State:
        """How it stands now; "lost" when its worker has gone without a word."""
        state: State = self._row()["state"]
        return state

    @property
    def progress(self) -> tuple[str, int, int]:
        """What it is doing, and how much of how much is done (bytes; 0 of 0 if unknown)."""
        row = self._row()
        return row["phase"], row["done"], row["total"]

    def result(self, timeout: float | None = None, *, progress: bool = True) -> T_co:
        """Wait for the model it makes; shows a progress bar unless told not to.

        `timeout`: seconds.

        Raises:
            JobTimeoutError: it is still running after `timeout`; it goes on.
            JobCancelled, JobLost, JobFailed: it ended so.
            CustomizedModelsError: whatever of our errors ended it, as its own class.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with _Bar(self.name, shown=progress) as bar:
            while (row := self._row())["state"] in RUNNING:
                bar.update(row["phase"], row["done"], row["total"])
                if deadline is not None and time.monotonic() > deadline:
                    raise JobTimeoutError(f"{self!r} after {timeout} seconds; it goes on")
                time.sleep(POLL_SECONDS)
            done = row["total"] if row["state"] == "succeeded" else row["done"]
            bar.update(row["phase"], done, row["total"])
        return self._outcome(row)

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        while (row := self._row())["state"] in RUNNING:
            await asyncio.sleep(POLL_SECONDS)
        return self._outcome(row)

    def cancel(self) -> bool:
        """Ask it to stop; False if it has ended already.

        It stops before its next tensor and leaves nothing behind. If it was just publishing, it
        may still succeed: `result` tells.
        """
        from ..catalog import database as db

        with self._registry._database.write() as connection:
            row = db.find(connection, db.jobs, id=str(self.id))
            if row is None or row["state"] not in RUNNING:
                return False
            db.change(connection, db.jobs, self.name, cancel=1)
        return True

    def _row(self) -> Any:
        from ..catalog import database as db

        self._reap()
        with self._registry._database.read() as connection:
            row = db.find(connection, db.jobs, id=str(self.id))
            if row is None:
                raise NotFoundError(f"no job {self.id}")
            if row["state"] in RUNNING and not db.lease_holds(connection, str(self.id)):
                return dict(row) | {"state": "lost"}
        return row

    def _reap(self) -> None:
        """If the worker is our child and has ended, nobody need wait for its lease."""
        from ..catalog import database as db

        child = _children.get(str(self.id))
        if child is not None and child.poll() is not None:
            _children.pop(str(self.id), None)
            with self._registry._database.write() as connection:
                db.end_lease(connection, str(self.id))

    def _outcome(self, row: Any) -> T_co:
        if row["state"] == "succeeded":
            model: T_co = self._registry.get(MAKES[self.kind], self.name)
            return model
        if row["state"] == "cancelled":
            raise JobCancelled(f"{self.kind} of {self.name} was cancelled")
        if row["state"] == "lost":
            log = log_path(self._registry, str(self.id))
            tail = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
            said = f"; the last it said: {shown(tail, 2000)}" if tail else ""
            raise JobLost(
                f"the worker of {self.kind} {self.name} is gone; nothing was published{said}"
            )
        raise _error_of(row["error_type"], row["error"])


def _error_of(class_name: str, message: str) -> CustomizedModelsError:
    """The worker's error, again: of our tree by its name, anything else as `JobFailed`."""
    cls = getattr(_errors, class_name, JobFailed)
    error: CustomizedModelsError = cls(message)
    return error


class _Bar:
    """A progress bar that changes its total with the phase; silent if not `shown`."""

    def __init__(self, title: str, *, shown: bool) -> None:
        self._title = title
        self._shown = shown
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, phase: str, done: int, total: int) -> None:
        if not self._shown or not total:
            return
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(unit="B", unit_scale=True, desc=self._title)
        if self._bar.total != total:
            self._bar.reset(total)
        self._bar.set_postfix_str(phase, refresh=False)
        self._bar.update(done - self._bar.n)


def start_job(
    registry: ModelRegistry,
    kind: str,
    name: Callable[[uuid.UUID], str],
    arguments: Mapping[str, Any],
    holds: tuple[str, ...],
) -> Job[Any]:
    """Record a job and start its worker.

    `name(id)`: of the model it makes; if that is taken, another id is drawn. `holds`: keys that
    must not be deleted while it runs.
    """
    from ..catalog import database as db

    payload = pickled(registry)
    for attempt in range(100):
        id = uuid.uuid4()
        try:
            with registry._database.write() as connection:
                for table in (db.complete_models, db.live_models):
                    if db.find(connection, table, name=name(id)) is not None:
                        raise AlreadyExistsError(name(id))
                db.add(
                    connection,
                    db.jobs,
                    id=str(id),
                    kind=kind,
                    name=name(id),
                    state="queued",
                    arguments=json.dumps(arguments),
                    phase="starting",
                    created=datetime.now(UTC).isoformat(),
                )
                db.take_lease(connection, str(id), (f"job/{id}", *holds), f"{kind} {name(id)}")
            break
        except AlreadyExistsError:
            if attempt == 99:
                raise
    _start_worker(registry, str(id), payload)
    return Job(registry, id)


def pickled(registry: ModelRegistry) -> bytes:
    """The registry as another interpreter can load it.

    Raises:
        JobFailed: its storage does not pickle, or is defined in `__main__`.
    """
    try:
        payload = pickle.dumps(registry)
    except Exception as error:
        raise JobFailed(
            f"a job needs a registry that pickles; this one's storage does not: {shown(error)}"
        ) from error
    if b"__main__" in payload:
        raise JobFailed("a job cannot import a storage defined in __main__; put it in a module")
    return payload


def log_path(registry: ModelRegistry, id: str) -> Path:
    """Where a job's worker writes what it has to say; removed when the job ends in order."""
    return registry.root / ".jobs" / f"{id}.log"


def end_job(
    registry: ModelRegistry,
    connection: Connection,
    lease: Lease,
    name: str,
    state: State,
    error_type: str | None = None,
    error: str | None = None,
) -> None:
    """End a job in the transaction that counts: once it is visible, its worker touches nothing."""
    from ..catalog import database as db

    db.change(connection, db.jobs, name, state=state, error_type=error_type, error=error)
    log_path(registry, lease.owner).unlink(missing_ok=True)
    lease.end(connection)


def warm_up() -> None:
    """See `Merger.warm_up`."""
    start_ahead(command("worker", "stand_by"))


def _start_worker(registry: ModelRegistry, id: str, payload: bytes) -> None:
    """Hand the job to the interpreter that waits for one, or to a new one, on its stdin."""
    log = log_path(registry, id)
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    job = pickle.dumps((id, str(log), payload))
    child = take_started()
    if child is None or not _handed_over(job, child):
        with log.open("wb") as output:
            child = start([*command("worker"), id], output)  # the id is for those who look at it
        _handed_over(job, child)  # if it died already, its log says why
    for other in [other for other, known in _children.items() if known.returncode == 0]:
        _children.pop(other, None)
    _children[id] = child


def _handed_over(job: bytes, child: subprocess.Popen[bytes]) -> bool:
    """False if it had ended before it could begin."""
    assert child.stdin is not None
    try:
        with child.stdin:
            child.stdin.write(job)
    except BrokenPipeError:
        return False
    return True
