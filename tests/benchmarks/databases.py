"""How many changes and looks a second sixteen processes make of one registry's rows.

    python -m tests.benchmarks.databases [processes] [operations]

Each process adds as many environments, then finds as many, by transactions of their own. Both
databases write to the disk at every commit. What is printed for SQLite and for PostgreSQL on this
host is operations per second of all processes together, how long one took at the median and at the
most, and how many failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from customized_models import DatabaseError, DeploymentEnvironment
from customized_models.catalog.catalog import Catalog
from tests.servers.postgresql_server import postgresql_server


def add(catalog: Catalog, name: str) -> None:
    catalog.levels.add_once(DeploymentEnvironment(name, backend="llama_cpp"))


def find(catalog: Catalog, name: str) -> None:
    catalog.levels.get(DeploymentEnvironment, name)


def timed(do: Callable[[str], None], names: list[str]) -> list[float]:
    """How long each took, in seconds; -1 if it failed."""
    took = []
    for name in names:
        begun = time.perf_counter()
        try:
            do(name)
        except DatabaseError:
            took.append(-1.0)
        else:
            took.append(time.perf_counter() - begun)
    return took


def measure(
    title: str, catalog: Catalog, do: Callable[[Catalog, str], None], processes: int, count: int
) -> None:
    begun, pipes = time.perf_counter(), []
    for process in range(processes):
        reading, writing = os.pipe()
        if os.fork() == 0:
            names = [f"box-{process}-{number}" for number in range(count)]
            with os.fdopen(writing, "w") as answer:
                json.dump(timed(lambda name: do(catalog, name), names), answer)
            os._exit(0)
        os.close(writing)
        pipes.append(reading)
    took: list[float] = []
    for pipe in pipes:
        with os.fdopen(pipe) as answer:
            took += json.load(answer)
        os.wait()
    seconds = time.perf_counter() - begun
    done = sorted(t for t in took if t >= 0)
    print(
        f"{title}: {len(done) / seconds:.0f} operations/s, median {1e3 * done[len(done) // 2]:.1f} "
        f"ms, max {1e3 * done[-1]:.0f} ms, {len(took) - len(done)} failed",
        flush=True,
    )


def main() -> None:
    processes, count = (int(argument) for argument in [*sys.argv[1:], 16, 1000][:2])
    with (
        tempfile.TemporaryDirectory() as directory,
        postgresql_server(fsync="on") as server,
    ):
        urls = {
            "SQLite": f"sqlite:///{Path(directory) / 'registry.db'}",
            "PostgreSQL by its socket": server.database(),
            "PostgreSQL by a port": server.by_network(server.database()),
        }
        for title, url in urls.items():
            catalog = Catalog(url)
            add(catalog, "first")
            for do in (add, find):
                measure(f"{title}, {do.__name__}", catalog, do, processes, count)


if __name__ == "__main__":
    main()
