"""`JobQueue`: where jobs are recorded and their workers started."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.writing import disk_errors
from ..processes import Process
from ..shelf import Shelf
from .job import Job, workers
from .workers import pickled, start_worker, warm_up

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog


class JobQueue:
    """The jobs of the registry with these rows and bytes.

    Args:
        catalog: Where they are recorded.
        shelf: What they work on.
        logs: The directory for what workers print; a log goes when its job ends in order.
    """

    def __init__(self, catalog: Catalog, shelf: Shelf, logs: Path) -> None:
        self._catalog = catalog
        self._shelf = shelf
        self._logs = logs

    def submit(
        self,
        kind: str,
        name: Callable[[uuid.UUID], str],
        arguments: Mapping[str, Any],
        holds: tuple[str, ...],
        *objects: Any,
    ) -> Job[Any]:
        """Record a job and start its worker; returns at once.

        Args:
            kind: Of the job: "save" or "deploy".
            name: Gives for an id the name of the model that it makes.
            arguments: All that the work depends on, as JSON can hold it.
            holds: Keys that must not be deleted while it runs.
            objects: Further arguments, which need to pickle.

        Raises:
            JobFailed: The registry or an object does not pickle, or is defined in `__main__`.
        """
        payload = pickled(self._catalog, self._shelf, *objects)
        # The job is held by the server that will fork its worker: this process may end before.
        server = Process.of(warm_up())
        id = self._catalog.jobs.add(kind, name, arguments, holds, server)
        self._start(str(id), payload)
        return self.job(id)

    def job(self, id: uuid.UUID) -> Job[Any]:
        """The job with that id; `NotFoundError` if there is none."""
        return Job(self._catalog, self._log(str(id)), id)

    def jobs(self, state: str | None = None) -> Iterator[Job[Any]]:
        """All jobs, or those in one state, newest first."""
        every = (self.job(id) for id in self._catalog.jobs.ids())
        return (job for job in every if state is None or job.state == state)

    def warm_up(self) -> None:
        """See `Merger.warm_up`."""
        warm_up()

    def _log(self, id: str) -> Path:
        return self._logs / f"{id}.log"

    def _start(self, id: str, payload: bytes) -> None:
        log = self._log(id)
        with disk_errors("the job's output has no place"):
            log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            output = log.open("wb")
        with output:
            arguments = pickled(id, str(log), payload)
            workers[id] = start_worker("customized_models.jobs.worker:run", arguments, output)
        for other in [other for other, known in workers.items() if known.has_ended]:
            workers.pop(other).close()
