"""What interrupted downloads and trainings have left in a registry's root, and removing it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .files.locks import lock
from .files.writing import disk_errors
from .outbox import Outbox
from .shelf import GRACE_SECONDS, Litter

DOWNLOADS = ".hub"
"""Where models from the Hub are while they are fetched."""


def sweep(root: Path, *, grace_seconds: float, dry_run: bool) -> list[Litter]:
    """See `ModelRegistry.gc`.

    What a training has saved may be all that there is of it, so it stays for a week in any case.
    """
    outbox = Outbox(root)
    kept, week = {*outbox.kept()}, max(grace_seconds, GRACE_SECONDS)
    graces = dict.fromkeys((root / DOWNLOADS).glob("*/"), grace_seconds)
    graces |= {path: week for path in outbox.directory.glob("*/") if path not in kept}
    found = []
    for directory, grace in sorted(graces.items()):
        with lock(directory, wait=False) as alone:
            if alone:
                due = not dry_run and time.time() - _last_touched(directory) >= grace
                if due:
                    shutil.rmtree(directory, ignore_errors=True)
                found.append(Litter(directory.relative_to(root).as_posix(), due))
    return found


def _last_touched(directory: Path) -> float:
    """When something in a directory was last written, in seconds since 1970."""
    with disk_errors(f"{directory} cannot be looked at"):
        return max(path.lstat().st_mtime for path in _every(directory))


def _every(directory: Path) -> Iterator[Path]:
    yield directory
    yield from directory.rglob("*")
