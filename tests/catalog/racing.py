"""A race: `racing.py DATABASE PROCESSES COUNT` prints the names that its processes got.

Each process adds the same environments, and reserves names of its own.
"""

from __future__ import annotations

import os
import sys

from customized_models import DeploymentEnvironment
from customized_models.catalog.catalog import Catalog


def main(database: str, processes: str, count: str) -> int:
    catalog = Catalog(database)
    children = []
    for _ in range(int(processes)):
        child = os.fork()
        if child == 0:
            race(catalog, int(count))
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


def race(catalog: Catalog, count: int) -> None:
    names = []
    for number in range(count):
        catalog.levels.add_once(DeploymentEnvironment(f"box-{number}", backend="llama_cpp"))
        reserved = catalog.reservations.reserve(train_name="race", base_model="llama-tiny")
        names.append(reserved.name)
    os.write(1, "".join(f"{name}\n" for name in names).encode())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) and 1)
