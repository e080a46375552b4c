"""Jobs that an executor runs: a pool of `concurrent.futures`, or an engine that has one, as Dask.

The job's row is the truth; the future only carries the job about. Where the executor runs it, the
row is asked first, and the work is done in a process of its own, forked on that host, as that of
any other job. An engine that loses sight of a worker may send another: while the lease of the first
lasts, the second waits for it, and does the job once the first has gone without a word.

A job that several workers share is submitted as often. All of these are alike: whichever runs first
does the job, the others help it (`merging.sharing`), and if it goes, the next one does the job.
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

from attrs import evolve, field, frozen

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
        number: Of this errand among those for the job: Dask takes equal ones for one.
    """

    catalog: Catalog
    id: str
    holds: Sequence[str]
    payload: bytes = field(repr=False)
    log: Path
    number: int = 0


def run_by_executor(errand: Errand) -> None:
    """What the executor runs: does a job on this host, and returns once it has ended somehow.

    Or helps another that does, and returns once there is nothing left to help with.

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
            has_helped = worker.answer()
        finally:
            worker.close()
        with suppress(DatabaseError), errand.catalog.database.write() as connection:
            errand.catalog.leases.end(connection, owner)  # nobody need wait until it runs out
        if has_helped:
            return


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


def hand_over(executor: Executor, errand: Errand, workers: int) -> None:
    """Submit a job to an executor, for so many workers to share it.

    Raises:
        JobFailed: The executor takes no more work.
    """
    catalog, futures = errand.catalog, list[Future[None]]()
    try:
        for number in range(workers):
            futures.append(executor.submit(run_by_executor, evolve(errand, number=number)))
    except Exception as error:  # an executor may be anybody's
        refused = JobFailed(f"the executor does not take the job: {shown(error)}")
        for future in futures:
            future.cancel()
        catalog.jobs.give_back(errand.id, refused)
        raise refused from error
    _submitter(catalog).add(errand.id, futures)


def withdraw(catalog: Catalog, id: str) -> None:
    """Tell the executor, if it is this process that has submitted the job to one."""
    _submitter(catalog).cancel(id)


class _Submitter:
    """What this process has submitted to executors, of the jobs of one registry.

    A thread renews their leases, and says in their rows what became of futures that are done.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._futures: dict[str, list[Future[None]]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._runs = False

    def add(self, id: str, futures: list[Future[None]]) -> None:
        with self._lock:
            self._futures[id] = futures
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, daemon=True, name="submitted jobs").start()
        for future in futures:
            future.add_done_callback(lambda _: self._wake.set())

    def cancel(self, id: str) -> None:
        with self._lock:
            futures = self._futures.get(id, [])
        for future in futures:
            future.cancel()

    def _run(self) -> None:
        while True:
            with self._lock:
                futures = dict(self._futures)
                if not futures:
                    self._runs = False
                    return
            done = {id for id, every in futures.items() if all(future.done() for future in every)}
            for id in done:
                self._give_back(id, futures[id])
            with suppress(DatabaseError):  # busy or out of reach: the next round may succeed
                self._catalog.jobs.vouch(futures.keys() - done)
            self._wake.wait(_VOUCH_SECONDS)
            self._wake.clear()

    def _give_back(self, id: str, futures: list[Future[None]]) -> None:
        try:
            self._catalog.jobs.give_back(id, _reason(futures))
        except DatabaseError:
            return  # as above
        except CustomizedModelsError:
            pass  # the row is damaged: there is nothing to be said in it
        with self._lock:
            del self._futures[id]


def _reason(futures: list[Future[None]]) -> JobFailed:
    """Why a job has not ended, though its futures have."""
    errors = (None if future.cancelled() else future.exception() for future in futures)
    error = next(filter(None, errors), None)
    why = "" if error is None else f" ({type(error).__name__}: {shown(error)})"
    return JobFailed(f"the executor has dropped the job{why}; submit it again")


_submitters: dict[tuple[int, str], _Submitter] = {}
"""By process, so that a fork has its own, and by database."""


def _submitter(catalog: Catalog) -> _Submitter:
    return _submitters.setdefault((os.getpid(), catalog.database.url), _Submitter(catalog))
