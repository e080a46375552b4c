"""Locks on a directory of this host, which end with the process that holds them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else has a lock on `directory`, and it is there; nobody has meanwhile.

    Args:
        directory: Whoever has the lock may move or remove it.
        wait: Wait for whoever has it, rather than say no.
    """
    import fcntl  # Windows, where the package can be imported, has none

    with _locked(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)) as alone:
        yield alone


@contextmanager
def hold(directory: Path) -> Iterator[bool]:
    """Whether `directory` is there; nobody has it for itself by `lock` meanwhile, many may hold it.

    Waits for whoever has.
    """
    import fcntl

    with _locked(directory, fcntl.LOCK_SH) as held:
        yield held


@contextmanager
def _locked(directory: Path, operation: int) -> Iterator[bool]:
    import fcntl

    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, operation)
            there = os.path.samestat(os.fstat(fd), os.stat(directory, follow_symlinks=False))
        except (BlockingIOError, FileNotFoundError):
            there = False
        yield there
    finally:
        os.close(fd)
