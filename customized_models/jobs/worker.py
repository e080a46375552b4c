"""The worker process of one job, which comes pickled on its stdin. It imports everything."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

from ..catalog.catalog import Catalog
from ..catalog.leases import Lease
from ..deploying.running import run_deploy
from ..errors import CustomizedModelsError, JobCancelled, JobFailed, JobLost
from ..merging import preload
from ..merging.merger import run_save
from ..shelf import Shelf
from .standby import add_search_path
from .work import Work

REPORT_SECONDS = 0.5  # between two writes of the progress

RUN: Mapping[str, Any] = {"save": run_save, "deploy": run_deploy}
"""What does the work of each kind of job."""


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
        self._phase = phase
        self._next = time.monotonic() + REPORT_SECONDS
        self._catalog.jobs.report(self._id, phase, done, total)


def run(catalog: Catalog, shelf: Shelf, id: str, log: str, *objects: Any) -> None:
    """Do the job; its end is in its row."""
    with catalog.lease(id) as lease:
        row = catalog.jobs.begin(id)
        if row is None:
            return
        progress = Reporter(catalog, id, lease)
        work = Work.of(row, catalog, shelf, lease, log, progress)
        if _imports.is_alive():
            _imports.join()  # what it fails at, this thread will fail at too
        try:
            RUN[row["kind"]](work, *objects)
        except JobLost:
            raise
        except JobCancelled:
            _end(work, "cancelled")
        except CustomizedModelsError as error:
            _end(work, "failed", error)
        except BaseException:
            _end(work, "failed", JobFailed(traceback.format_exc()))


def _end(work: Work, state: str, error: CustomizedModelsError | None = None) -> None:
    with work.catalog.database.write() as connection:
        work.lease.check(connection)
        work.end(connection, state, error)


_imports = threading.Thread(target=preload, name="imports")


def main() -> None:
    """Read a job from stdin, do it, exit."""
    try:
        id, log, path, payload = pickle.load(sys.stdin.buffer)  # from who started us
    except EOFError:
        return  # it has no job for us, or has ended
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    add_search_path(path)
    catalog, shelf, *objects = pickle.loads(payload)
    run(catalog, shelf, id, log, *objects)


def stand_by() -> None:
    """As `main`, ahead of the job: what a merge takes seconds to import is there when it comes.

    It may come before; its lease is kept meanwhile.
    """
    _imports.start()
    main()
