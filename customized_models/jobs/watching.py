"""Whoever awaits jobs is told of them by one thread for each registry, however many wait.

The event loop never waits for the database, not even while another process has it locked.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import NotFoundError

if TYPE_CHECKING:
    from ..catalog.database import Database

Row: TypeAlias = "Mapping[str, Any] | Exception"
Look: TypeAlias = Callable[[Collection[str]], Mapping[str, Row]]
"""Gives the rows of jobs by their ids."""


async def changes(database: Database, look: Look, id: str) -> AsyncGenerator[Mapping[str, Any]]:
    """A job's row now, and again whenever it has changed, for as long as it is asked for.

    Args:
        database: The registry's; all that wait for its jobs share one thread.
        look: Called in that thread.
        id: The job's.

    Raises:
        NotFoundError: There is no such job.
        CustomizedModelsError: What `look` raises, or has as its row.
    """
    loop, rows = asyncio.get_running_loop(), asyncio.Queue[Row]()

    def tell(row: Row) -> None:
        loop.call_soon_threadsafe(rows.put_nowait, row)

    watcher = _watchers.setdefault((os.getpid(), database.url), _Watcher(database, look))
    watcher.add(id, tell)
    try:
        while True:
            row = await rows.get()
            if isinstance(row, Exception):
                raise row
            yield row
    finally:
        watcher.remove(tell)


class _Watcher:
    """The thread of one registry; it runs while somebody waits."""

    def __init__(self, database: Database, look: Look) -> None:
        self._database = database
        self._look = look
        self._waiting: dict[Callable[[Row], None], tuple[str, Row | None]] = {}  # id, last seen
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._runs = False

    def add(self, id: str, tell: Callable[[Row], None]) -> None:
        with self._lock:
            self._waiting[tell] = id, None
            self._wake.set()
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, daemon=True, name="job watcher").start()

    def remove(self, tell: Callable[[Row], None]) -> None:
        with self._lock:
            self._waiting.pop(tell, None)
            if not self._waiting:
                self._wake.set()  # so that the thread ends

    def _run(self) -> None:
        with self._database.telling(self._wake):
            while True:
                with self._lock:
                    self._wake.clear()
                    ids = {id for id, _ in self._waiting.values()}
                    if not ids:
                        self._runs = False
                        return
                self._tell(self._rows(ids))
                self._wake.wait(self._database.poll_seconds)

    def _rows(self, ids: set[str]) -> Mapping[str, Row]:
        missing = {id: NotFoundError(f"no job {id}") for id in ids}
        try:
            return {**missing, **self._look(ids)}
        except Exception as error:  # whoever waits gets it
            return dict.fromkeys(ids, error)

    def _tell(self, rows: Mapping[str, Row]) -> None:
        with self._lock:
            for tell, (id, last) in list(self._waiting.items()):
                if id in rows and rows[id] != last:
                    self._waiting[tell] = id, rows[id]
                    try:
                        tell(rows[id])
                    except RuntimeError:  # its loop is closed
                        del self._waiting[tell]


_watchers: dict[tuple[int, str], _Watcher] = {}
"""By process, so that a fork has its own, and by database."""
