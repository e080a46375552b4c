"""`JobQueue`: where jobs are recorded and their workers started."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ..arguments import instance
from ..catalog.listing import Listing
from ..errors import IntegrityError
from ..files.writing import disk_errors
from ..processes import Process
from ..shelf import Shelf
from .executors import Errand, hand_over
from .job import Job, workers
from .workers import open_output, pickled, start_worker, warm_up

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog

_log = logging.getLogger(__name__)


class JobQueue:
    """The jobs of the registry with these rows and bytes.

    Args:
        catalog: Where they are recorded.
        shelf: What they work on.
        logs: The directory for what workers print.
        max_running: How many jobs of the registry may run at once; others wait.
        executor: Runs the jobs; processes of this host do if None.
    """

    def __init__(
        self,
        catalog: Catalog,
        shelf: Shelf,
        logs: Path,
        max_running: int,
        executor: Executor | None = None,
    ) -> None:
        self._catalog = catalog
        self._shelf = shelf
        self._logs = logs
        self._max_running = max_running
        self._executor = executor

    def run_by(self, executor: Executor | None) -> JobQueue:
        """This queue, whose jobs an executor runs; processes of this host if None.

        Raises:
            InvalidArgumentError: It is no executor.
        """
        if executor is not None:
            instance("executor", executor, Executor, "a concurrent.futures.Executor")
        return JobQueue(self._catalog, self._shelf, self._logs, self._max_running, executor)

    def submit(
        self,
        kind: str,
        name: Callable[[uuid.UUID], str],
        arguments: Mapping[str, Any],
        holds: tuple[str, ...],
        *objects: Any,
    ) -> Job[Any]:
        """Record a job and start its worker, or hand it to the executor; returns at once.

        Args:
            kind: Of the job: "save", "rebuild", "deploy" or "export".
            name: Gives for an id the name of the model that it makes.
            arguments: All that the work depends on, as JSON can hold it.
            holds: Keys that must not be deleted while it runs.
            objects: Further arguments, which need to pickle.

        Raises:
            JobFailed: The registry or an object does not pickle, or is defined in `__main__`; or
                the executor takes no more work.
        """
        payload, add = pickled(self._catalog, self._shelf, *objects), self._catalog.jobs.add
        if self._executor is None:
            # The job is held by the server that will fork its worker: this process may end before.
            server = Process.of(warm_up())
            id = add(kind, name, arguments, holds, self._max_running, server)
            self._start(str(id), payload)
        else:
            id = add(kind, name, arguments, holds, None)
            errand = Errand(self._catalog, str(id), holds, payload, self._log(str(id)))
            hand_over(self._executor, errand, arguments.get("workers", 1))
        job = self.job(id)
        _log.info("job %s submitted: %s of %s", id, kind, job.name)
        return job

    def job(self, id: uuid.UUID) -> Job[Any]:
        """The job with that id; `NotFoundError` if there is none."""
        return self._of(self._catalog.jobs.row(str(id)))

    def jobs(self, state: str | None = None) -> Listing[Job[Any]]:
        """All jobs, or those in one state, newest first."""
        columns = ("kind", "name", "state", "progress", "created")
        return Listing("Job", columns, _JobRows(self._catalog, state, self._of))

    def drop_logs(self, grace_seconds: float) -> None:
        """Remove what workers have printed that ended longer ago than that."""
        with disk_errors("logs of jobs cannot be removed"):
            for log in self._logs.glob("*.log"):
                if log.stat().st_mtime < time.time() - grace_seconds:
                    log.unlink(missing_ok=True)

    def warm_up(self) -> None:
        """See `Merger.warm_up`."""
        warm_up()

    def _of(self, row: Mapping[str, Any]) -> Job[Any]:
        return Job(self._catalog, self._log(row["id"]), row)

    def _log(self, id: str) -> Path:
        return self._logs / f"{id}.log"

    def _start(self, id: str, payload: bytes) -> None:
        with open_output(self._log(id)) as output:
            arguments = pickled(id, payload)
            workers[id] = start_worker("customized_models.jobs.worker:run", arguments, output)
        for other, known in list(workers.items()):
            if known.has_ended:
                workers.pop(other, None)
                known.close()


@frozen
class _JobRows:
    """The rows of the jobs in a state."""

    catalog: Catalog
    state: str | None
    of: Callable[[Mapping[str, Any]], Job[Any]]

    def numbers(self, limit: int | None = None, offset: int = 0) -> list[int]:
        """See `listing.Rows`."""
        every = self.catalog.jobs.numbers(self.state, None)
        return every[offset:][:limit]

    def count(self) -> int:
        """See `listing.Rows`."""
        return len(self.numbers())

    def newest(self) -> int:
        """See `listing.Rows`."""
        return max(self.catalog.jobs.numbers(None, 1), default=0)

    def load(self, numbers: Sequence[int]) -> Mapping[int, Job[Any] | IntegrityError]:
        """See `listing.Rows`."""
        return {
            number: row if isinstance(row, IntegrityError) else self.of(row)
            for number, row in self.catalog.jobs.numbered(numbers).items()
        }
