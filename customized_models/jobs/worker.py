"""What the worker process of a job does. It imports everything that does the work."""

from __future__ import annotations

import logging
import os
import pickle
import platform
import socket
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..catalog.catalog import Catalog
from ..catalog.leases import Lease
from ..deploying.exporting import run_export
from ..deploying.running import run_deploy
from ..errors import CustomizedModelsError, DatabaseError, JobCancelled, JobFailed, JobLost
from ..merging.merger import help_save, run_save
from ..merging.rebuilding import run_rebuild
from ..shelf import Shelf
from .work import Work

_log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5  # between two writes of the progress

RUN: Mapping[str, Any] = {
    "save": run_save,
    "rebuild": run_rebuild,
    "deploy": run_deploy,
    "export": run_export,
}
"""What does the work of each kind of job."""

HELP: Mapping[str, Any] = {"save": help_save}
"""What helps another worker with it, of jobs that several share."""


class Reporter:
    """A job's `Progress`: writes it to the job's row now and then, and stops the work in time."""

    def __init__(self, catalog: Catalog, id: str, lease: Lease) -> None:
        self._catalog = catalog
        self._id = id
        self._lease = lease
        self._next = 0.0
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report.

        Raises:
            JobCancelled: Someone asked the job to stop.
            JobLost: The lease has ended.
        """
        if self._lease.lost.is_set():
            raise JobLost("the lease ended while the job was stopped")
        if phase == self._phase and time.monotonic() < self._next:
            return
        if phase != self._phase:
            _log.info("job %s: %s", self._id, phase)
        self._phase = phase
        self._next = time.monotonic() + REPORT_SECONDS
        try:
            self._catalog.jobs.report(self._id, phase, done, total)
        except DatabaseError as error:  # the lease ends if that lasts too long
            _log.warning("job %s: %s", self._id, error)


class Follower:
    """The `Progress` of a worker that helps another: stops with the job."""

    def __init__(self, catalog: Catalog, id: str, lease: Lease) -> None:
        self._catalog = catalog
        self._id = id
        self._lease = lease
        self._next = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Look whether there still is something to help with, now and then.

        Raises:
            JobCancelled: The job has ended, or is to stop.
            JobLost: The lease of this worker has ended.
        """
        if self._lease.lost.is_set():
            raise JobLost("the lease ended while the worker was stopped")
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REPORT_SECONDS
        with suppress(DatabaseError):  # the lease ends if that lasts too long
            self._catalog.jobs.follow(self._id)


def run(connection: socket.socket, id: str, payload: bytes, owner: str | None = None) -> None:
    """Do a job when it is its turn; its end is in its row.

    Args:
        connection: Closed when the process ends, which tells whoever submitted the job.
        id: The job's.
        payload: The catalog, the shelf and what else the work needs, pickled.
        owner: Of the lease that it is done under; the job's own if None.
    """
    _log_to_output()
    catalog, shelf, *objects = pickle.loads(payload)  # from a process of ours
    if owner is not None and catalog.jobs.helper_number(owner):
        _help(catalog, shelf, id, owner)
        with suppress(OSError):  # who asked may be gone
            connection.sendall(b"has helped")
    else:
        _run(catalog, shelf, id, owner or id, objects)


def _run(catalog: Catalog, shelf: Shelf, id: str, owner: str, objects: list[Any]) -> None:
    with catalog.lease(owner) as lease:
        while (wait := catalog.jobs.seconds_to_wait(id)) and not lease.lost.wait(wait):
            pass
        _take_back(catalog, shelf, id)
        row = catalog.jobs.begin(id, owner)
        if row is None:
            return
        _log.info("job %s: worker %s, process %d of %s", id, owner, os.getpid(), platform.node())
        progress = Reporter(catalog, id, lease)
        work = Work.of(row, catalog, shelf, lease, progress)
        try:
            progress("starting", 0, 0)  # it may have been cancelled while it waited
            RUN[row["kind"]](work, *objects)
            _log.info("job %s: succeeded", id)
        except JobLost:
            raise
        except JobCancelled:
            _end(work, "cancelled")
        except CustomizedModelsError as error:
            _log.debug("job %s failed", id, exc_info=True)
            _end(work, "failed", error)
        except BaseException:
            _end(work, "failed", JobFailed(traceback.format_exc()))


def _help(catalog: Catalog, shelf: Shelf, id: str, owner: str) -> None:
    """Help with a job; what goes wrong here does not end it, for others do what is left."""
    with catalog.lease(owner) as lease:
        row = catalog.jobs.row(id)
        _log.info("job %s: helper %s, process %d of %s", id, owner, os.getpid(), platform.node())
        work = Work.of(row, catalog, shelf, lease, Follower(catalog, id, lease))
        try:
            HELP[row["kind"]](work)
            _log.info("job %s: helper %s has nothing left to do", id, owner)
        except JobCancelled as error:
            _log.info("job %s: helper %s: %s", id, owner, error)
        except Exception:
            _log.warning("job %s: helper %s failed", id, owner, exc_info=True)


def _take_back(catalog: Catalog, shelf: Shelf, id: str) -> None:
    """Finish or undo what workers of the job that were killed had begun to publish.

    Where that fails the name stays taken, and the job ends with the error that says so.
    """
    *before, _ = catalog.jobs.workers_of(catalog.jobs.row(id))
    if before:
        _log.warning("job %s: worker %s has gone without a word", id, before[-1])
        with suppress(CustomizedModelsError):
            shelf.recover()


def _end(work: Work, state: str, error: CustomizedModelsError | None = None) -> None:
    _log.info("job %s: %s%s", work.id, state, f": {error}" if error else "")
    with work.catalog.database.write() as connection:
        work.lease.check(connection)
        work.end(connection, state, error)


def _log_to_output() -> None:
    """Log all steps of this library to what takes the worker's output."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("customized_models")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
