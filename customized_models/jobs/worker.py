"""The worker process of one job, which comes pickled on its stdin, with the registry."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from ..catalog import database as db
from ..errors import CustomizedModelsError, JobCancelled, JobLost
from ..merging import preload
from .job import end_job

if TYPE_CHECKING:
    from ..registry import ModelRegistry

REPORT_SECONDS = 0.5  # between two writes of the progress


class Reporter:
    """A job's `Progress`: writes it to the job's row now and then, and stops the work in time."""

    def __init__(self, registry: ModelRegistry, id: str, lease: db.Lease) -> None:
        self._database = registry._database
        self._id = id
        self._lease = lease
        self._next = 0.0
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report.

        Raises:
            JobCancelled: someone asked the job to stop.
            JobLost: the lease has ended.
        """
        if self._lease.lost.is_set():
            raise JobLost("the lease ended while the job was stopped")
        if phase == self._phase and time.monotonic() < self._next:
            return
        self._phase = phase
        self._next = time.monotonic() + REPORT_SECONDS
        with self._database.write() as connection:
            row = db.find(connection, db.jobs, id=self._id)
            if row is None or row["cancel"]:
                raise JobCancelled("cancelled on request")
            db.change(connection, db.jobs, row["name"], phase=phase, done=done, total=total)


def run(registry: ModelRegistry, id: str) -> None:
    """Do the job; its end is in its row."""
    with db.Lease(registry._database, id) as lease:
        with registry._database.write() as connection:
            lease.check(connection)
            row = db.find(connection, db.jobs, id=id)
            if row is None or row["state"] != "queued":
                return
            db.change(connection, db.jobs, row["name"], state="running")
        try:
            _work(registry, row, Reporter(registry, id, lease), lease)
        except JobLost:
            raise
        except JobCancelled:
            ending: tuple[Any, ...] = ("cancelled",)
        except CustomizedModelsError as error:
            ending = ("failed", type(error).__name__, str(error))
        except BaseException:
            ending = ("failed", "JobFailed", traceback.format_exc())
        else:
            return
        with registry._database.write() as connection:
            lease.check(connection)
            end_job(registry, connection, lease, row["name"], *ending)


_imports = threading.Thread(target=preload, name="imports")


def _work(registry: ModelRegistry, row: Any, progress: Reporter, lease: db.Lease) -> None:
    if _imports.is_alive():
        _imports.join()  # what it fails at, this thread will fail at too
    arguments = json.loads(row["arguments"])
    if row["kind"] == "save":
        from ..merging.merger import run_save

        run_save(registry, row["id"], arguments, progress, lease)
    else:
        from ..deploying.deployer import run_deploy

        run_deploy(registry, row["id"], arguments, progress, lease)


def main() -> None:
    """Read a job from stdin, do it, exit."""
    try:
        id, log, registry = pickle.load(sys.stdin.buffer)  # from the process that started us
    except EOFError:
        return  # it has no job for us, or has ended
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    run(pickle.loads(registry), id)


def stand_by() -> None:
    """As `main`, ahead of the job: what a merge takes seconds to import is there when it comes.

    It may come before; its lease is kept meanwhile.
    """
    _imports.start()
    main()
