"""`Job`: the handle of work in the background.

Everything a job needs is in its row, so it outlives the process that started it, and any process
that opens the registry can watch, await or cancel it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ..display import html_table
from ..errors import JobCancelled, JobLost, JobTimeoutError, from_record, shown
from ..models import CompleteModel, LiveModel
from .bar import Bar
from .workers import Worker

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog

T_co = TypeVar("T_co", covariant=True)
State = Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"]

RESULT_TYPES: Mapping[str, type[Any]] = {"save": CompleteModel, "deploy": LiveModel}
"""The class of what each kind of job makes."""

_POLL_SECONDS = 0.1
_RUNNING = ("queued", "running")

workers: dict[str, Worker] = {}
"""The workers that this process has started, by the ids of their jobs."""


class Job(Generic[T_co]):
    """A save or a deployment under way, or over.

    >>> complete = merger.save(customized).result()          # doctest: +SKIP
    >>> complete = await merger.save(customized)             # doctest: +SKIP
    """

    def __init__(self, catalog: Catalog, log: Path, id: uuid.UUID) -> None:
        self._catalog = catalog
        self._log = log
        self.id = id
        row = self._row()
        self.kind: str = row["kind"]
        self.name: str = row["name"]

    def __repr__(self) -> str:
        return f"<Job {self.kind} {self.name} {self.state}>"

    def _repr_html_(self) -> str:
        row = self._row()
        share = f"{100 * row['done'] // row['total']} %" if row["total"] else ""
        return html_table(
            ("job", "makes", "state", "phase", "done"),
            [(self.kind, self.name, row["state"], row["phase"], share)],
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
        deadline = None if timeout is None else time.monotonic() + timeout
        with Bar(self.name, shown=progress) as bar:
            while (row := self._row())["state"] in _RUNNING:
                bar.update(row["phase"], row["done"], row["total"])
                if deadline is not None and time.monotonic() > deadline:
                    raise JobTimeoutError(
                        f"{self.kind} of {self.name} still runs after {timeout} seconds"
                    )
                self._pause()
            done = row["total"] if row["state"] == "succeeded" else row["done"]
            bar.update(row["phase"], done, row["total"])
        return self._outcome(row)

    def _pause(self) -> None:
        """Wait for as long as one waits between two looks, or until the worker has ended."""
        worker = workers.get(str(self.id))
        if worker is None:
            time.sleep(_POLL_SECONDS)
        else:
            worker.wait(_POLL_SECONDS)

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        while (row := self._row())["state"] in _RUNNING:
            await asyncio.sleep(_POLL_SECONDS)
        return self._outcome(row)

    def cancel(self) -> bool:
        """Ask it to stop; False if it has ended already.

        It stops before its next tensor and leaves nothing behind. If it was just publishing, it
        may still succeed: `result` tells.
        """
        return self._catalog.jobs.ask_to_stop(str(self.id))

    def _row(self) -> Mapping[str, Any]:
        self._reap()
        return self._catalog.jobs.row(str(self.id))

    def _reap(self) -> None:
        """If the worker is our child and has ended, nobody need wait for its lease."""
        worker = workers.get(str(self.id))
        if worker is not None and worker.has_ended:
            workers.pop(str(self.id)).close()
            with self._catalog.database.write() as connection:
                self._catalog.leases.end(connection, str(self.id))

    def _outcome(self, row: Mapping[str, Any]) -> T_co:
        if row["state"] == "succeeded":
            model: T_co = self._catalog.levels.get(RESULT_TYPES[self.kind], self.name)
            return model
        if row["state"] == "cancelled":
            raise JobCancelled(f"{self.kind} of {self.name} was cancelled")
        if row["state"] == "lost":
            raise JobLost(self._lost())
        raise from_record(self._catalog.jobs.error(row))

    def _lost(self) -> str:
        left = self._catalog.levels.pending_at_a_tool(self.name)
        what = (
            f"what it was deploying may be left at {left}; ModelRegistry.recover() removes it"
            if left
            else "nothing was published"
        )
        tail = self._log.read_text(errors="replace")[-2000:] if self._log.is_file() else ""
        said = f"; the end of its output: {shown(tail, 2000)}" if tail else ""
        return f"the worker of {self.kind} {self.name} is gone; {what}{said}"
