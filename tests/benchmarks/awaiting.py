"""How long an event loop stands still while many wait for jobs.

    python -m tests.benchmarks.awaiting [seconds]

Fifty coroutines wait for as many jobs whose progress changes all the time, then for as long again
while another writer has the database locked. What is printed is how late a timer of 5 milliseconds
comes: its median, its 99th percentile, and its latest; without anyone who waits, for comparison.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from customized_models import Job, ModelRegistry

WAITING = 50
BEAT_SECONDS = 0.005


def submitted(registry: ModelRegistry) -> Job[Any]:
    """A job without a worker; this process holds its lease."""
    id = registry.catalog.jobs.add("save", lambda id: f"a_s_{id.hex}", {}, (), WAITING)
    return registry.job(id)


async def lateness(jobs: list[Job[Any]], seconds: float) -> list[float]:
    """How late each beat came, in milliseconds, sorted."""

    async def wait(job: Job[Any]) -> None:
        await job

    waiting = [asyncio.create_task(wait(job)) for job in jobs]
    await asyncio.sleep(1)  # the first look imports what it needs
    late, end = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        await asyncio.sleep(BEAT_SECONDS)
        late.append(1e3 * (time.perf_counter() - begun - BEAT_SECONDS))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return sorted(late)


def report(title: str, late: list[float]) -> None:
    parts = (late[len(late) // 2], late[len(late) * 99 // 100], late[-1])
    print(f"{title}: p50 {parts[0]:.1f} ms, p99 {parts[1]:.1f} ms, max {parts[2]:.1f} ms")


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    with tempfile.TemporaryDirectory() as directory:
        registry = ModelRegistry(Path(directory) / "models")
        jobs = [submitted(registry) for _ in range(WAITING)]
        over = threading.Event()

        def work() -> None:
            done = 0
            while not over.wait(0.05):
                done += 1
                for job in jobs[:5]:
                    registry.catalog.jobs.report(str(job.id), "merging", done, 1 << 30)

        def hold() -> None:
            with closing(sqlite3.connect(registry.root / "registry.db", isolation_level=None)) as c:
                c.execute("BEGIN EXCLUSIVE")
                over.wait(seconds + 1)
                c.execute("ROLLBACK")

        report("nobody waits", asyncio.run(lateness([], seconds)))
        for title, other in ((f"{WAITING} wait", work), ("and a writer holds the database", hold)):
            over.clear()
            thread = threading.Thread(target=other)
            thread.start()
            report(title, asyncio.run(lateness(jobs, seconds)))
            over.set()
            thread.join()


if __name__ == "__main__":
    main()
