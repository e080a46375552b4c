"""Waiting in tests: as long as it takes, for the only limit is the test's own time-out."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object]) -> None:
    """Return once `condition()` is true."""
    while not condition():
        time.sleep(0.02)
