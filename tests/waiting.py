"""Waiting in tests: as long as it takes, for the only limit is the test's own time-out."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable

from customized_models import ModelRegistry


def until(condition: Callable[[], object]) -> None:
    """Return once `condition()` is true."""
    while not condition():
        time.sleep(0.02)


def stop_outside_a_transaction(worker: int, registry: ModelRegistry) -> None:
    """SQLite's lock stays with a process that is stopped; stop it when it holds none."""
    for _ in range(100):
        os.kill(worker, signal.SIGSTOP)
        connection = sqlite3.connect(registry.root / "registry.db", timeout=0.5)
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            os.kill(worker, signal.SIGCONT)
        finally:
            connection.close()
    raise AssertionError("the worker is always in a transaction")
