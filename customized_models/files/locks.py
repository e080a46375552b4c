"""A lock on a directory of this host, which ends with the process that holds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else has the lock on `directory`, and it is there; nobody has meanwhile.

    Args:
        directory: Whoever has the lock may move or remove it.
        wait: Wait for whoever has it, rather than say no.
    """
    import fcntl  # Windows, where the package can be imported, has none

    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = os.path.samestat(os.fstat(fd), os.stat(directory, follow_symlinks=False))
        except (BlockingIOError, FileNotFoundError):
            alone = False
        yield alone
    finally:
        os.close(fd)
