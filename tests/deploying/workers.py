"""The processes that deploy, for tests that kill them."""

from __future__ import annotations

import json
import sqlite3

from customized_models import ModelRegistry


def worker_of(registry: ModelRegistry, job: str) -> int:
    """The process that does a job."""
    with sqlite3.connect(registry.root / "registry.db") as connection:
        query = "SELECT process FROM leases WHERE owner = ?"
        (process,) = connection.execute(query, (job,)).fetchone()
    connection.close()
    return int(json.loads(process)["pid"])
