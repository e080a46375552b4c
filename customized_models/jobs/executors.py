"""Jobs that an executor runs: a pool of `concurrent.futures`, or an engine that has one, as Dask.

The job's row is the truth; the future only carries the job about. Where the executor runs it, the
row is asked first, and the work is done in a process of its own, forked on that host, as that of
any other job. An engine that loses sight of a worker may send another: while the lease of the first
lasts, the second waits for it, and does the job once the first has gone without a word.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from ..errors import CustomizedModelsError, DatabaseError, InUseError, JobFailed, shown
from ..processes import Process
from .workers import open_output, pickled, start_worker, warm_up

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog

_VOUCH_SECONDS = 10.0  # a sixth of a lease, as for any other
_LOOK_SECONDS = 1.0  # between two looks at another worker of the job, or for the database
_AWAY_SECONDS = 60.0  # a lease: then what the job held is lost
_TAIL = 2000  # characters of a log that an error ends with


@frozen
class Errand:
    """A job as an executor carries it about.

    Attributes:
        catalog: Where it is recorded.
        id: The job's.
        holds: Keys that must not be deleted while it runs.
        payload: What `worker.run` takes. It may have the database's password in it, and engines
            log what they were given.
        log: Takes what its workers print, on the host that it runs on.
    """

    catalog: Catalog
    id: str
    holds: Sequence[str]
    payload: bytes = field(repr=False)
    log: Path


def run_by_executor(errand: Errand) -> None:
    """What the executor runs: does a job on this host, and returns once it has ended somehow.

    While the database is away it waits, for as long as a lease lasts: else an executor would have
    gone through all jobs that wait in it before the database is back.

    Raises:
        CustomizedModelsError: The database or the log's disk failed.
    """
    while (owner := _take_up(errand)) is not None:
        with open_output(errand.log) as output:
            arguments = pickled(errand.id, errand.payload, owner)
            worker = start_worker("customized_models.jobs.worker:run", arguments, output)
        try:
            worker.answer()  # none: it is the end that is waited for
        finally:
            worker.close()
        with suppress(DatabaseError), errand.catalog.database.write() as connection:
            errand.catalog.leases.end(connection, owner)  # nobody need wait until it runs out


def _take_up(errand: Errand) -> str | None:
    """The owner of the next worker's lease, once no other is about the job; None at its end."""
    log, until = errand.log, time.monotonic() + _AWAY_SECONDS
    while True:
        said = log.read_text(errors="replace")[-_TAIL:] if log.is_file() else ""
        server = Process.of(warm_up())
        try:
            return errand.catalog.jobs.take_up(errand.id, errand.holds, server, said)
        except InUseError:
            until = time.monotonic() + _AWAY_SECONDS
        except DatabaseError:
            if time.monotonic() > until:
                raise
        time.sleep(_LOOK_SECONDS)


def hand_over(executor: Executor, errand: Errand) -> None:
    """Submit a job to an executor.

    Raises:
        JobFailed: The executor takes no more work.
    """
    catalog = errand.catalog
    try:
        future = executor.submit(run_by_executor, errand)
    except Exception as error:  # an executor may be anybody's
        refused = JobFailed(f"the executor does not take the job: {shown(error)}")
        catalog.jobs.give_back(errand.id, refused)
        raise refused from error
    _submitter(catalog).add(errand.id, future)


def withdraw(catalog: Catalog, id: str) -> None:
    """Tell the executor, if it is this process that has submitted the job to one."""
    _submitter(catalog).cancel(id)


class _Submitter:
    """What this process has submitted to executors, of the jobs of one registry.

    A thread renews their leases, and says in their rows what became of futures that are done.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._futures: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._runs = False

    def add(self, id: str, future: Future[None]) -> None:
        with self._lock:
            self._futures[id] = future
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, daemon=True, name="submitted jobs").start()
        future.add_done_callback(lambda _: self._wake.set())

    def cancel(self, id: str) -> None:
        with self._lock:
            future = self._futures.get(id)
        if future is not None:
            future.cancel()

    def _run(self) -> None:
        while True:
            with self._lock:
                futures = dict(self._futures)
                if not futures:
                    self._runs = False
                    return
            for id, future in futures.items():
                if future.done():
                    self._give_back(id, future)
            with suppress(DatabaseError):  # busy or out of reach: the next round may succeed
                self._catalog.jobs.vouch([id for id in futures if not futures[id].done()])
            self._wake.wait(_VOUCH_SECONDS)
            self._wake.clear()

    def _give_back(self, id: str, future: Future[None]) -> None:
        try:
            self._catalog.jobs.give_back(id, _reason(future))
        except DatabaseError:
            return  # as above
        except CustomizedModelsError:
            pass  # the row is damaged: there is nothing to be said in it
        with self._lock:
            del self._futures[id]


def _reason(future: Future[None]) -> JobFailed:
    """Why a job has not ended, though its future has."""
    error = None if future.cancelled() else future.exception()
    why = "" if error is None else f" ({type(error).__name__}: {shown(error)})"
    return JobFailed(f"the executor has dropped the job{why}; submit it again")


_submitters: dict[tuple[int, str], _Submitter] = {}
"""By process, so that a fork has its own, and by database."""


def _submitter(catalog: Catalog) -> _Submitter:
    return _submitters.setdefault((os.getpid(), catalog.database.url), _Submitter(catalog))
