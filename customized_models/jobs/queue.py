"""`JobQueue`: where jobs are recorded and their workers started."""

from __future__ import annotations

import pickle
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import JobFailed, shown
from ..files.writing import disk_errors
from ..shelf import Shelf
from .job import Job, workers
from .standby import command, search_path, start, start_ahead, take_started

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
        id = self._catalog.jobs.add(kind, name, arguments, holds)
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
        start_ahead(command("worker", "stand_by"))

    def _log(self, id: str) -> Path:
        return self._logs / f"{id}.log"

    def _start(self, id: str, payload: bytes) -> None:
        """Hand the job to the interpreter that waits for one, or to a new one, on its stdin."""
        log = self._log(id)
        with disk_errors("the job's output has no place"):
            log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        job = pickle.dumps((id, str(log), search_path(), payload))
        worker = take_started()
        if worker is None or not _handed_over(job, worker):
            with log.open("wb") as output:
                worker = start([*command("worker"), id], output)  # the id shows in `ps`
            _handed_over(job, worker)  # if it died already, its log says why
        for other in [other for other, known in workers.items() if known.returncode == 0]:
            workers.pop(other, None)
        workers[id] = worker


def pickled(*objects: Any) -> bytes:
    """Objects as another interpreter can load them.

    Raises:
        JobFailed: One does not pickle, or is defined in `__main__`.
    """
    try:
        payload = pickle.dumps(objects)
    except Exception as error:
        raise JobFailed(
            f"a job needs a storage and backends that pickle; {shown(error)}"
        ) from error
    if b"__main__" in payload:
        raise JobFailed(
            "a job cannot import a storage or backend defined in __main__; put it in a module"
        )
    return payload


def _handed_over(job: bytes, worker: subprocess.Popen[bytes]) -> bool:
    """False if it had ended before it could begin."""
    assert worker.stdin is not None
    try:
        with worker.stdin:
            worker.stdin.write(job)
    except BrokenPipeError:
        return False
    return True
