"""Files and directories that are on the disk once a call returns."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AlreadyExistsError, CustomizedModelsError, StorageError, shown


@contextmanager
def disk_errors(what: str, *, outcome_unknown: bool = False) -> Iterator[None]:
    """Turn the system's errors in the block into `StorageError`.

    Args:
        what: What failed.
        outcome_unknown: Whether the change is made before the block, which makes it last.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, CustomizedModelsError):
            raise
        where = f" ({shown(error.filename)})" if error.filename else ""
        why = f"{what}: {error.strerror or shown(error)}{where}"
        raise StorageError(why, outcome_unknown) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and push it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_directories(directory: Path) -> None:
    """Like `mkdir -p`, durable: every directory that was made is in its parent on the disk."""
    if directory.is_dir():
        return
    make_directories(directory.parent)
    directory.mkdir(exist_ok=True)
    fsync(directory.parent)


def fsync(path: Path) -> None:
    """Push a file or directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_without_replacing(source: Path, target: Path) -> None:
    """Rename a directory onto a path that must be free.

    A plain rename would silently replace an empty directory.

    Raises:
        AlreadyExistsError: Something is there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    if sys.platform == "darwin":
        failed = libc.renamex_np(old, new, 0x4)  # RENAME_EXCL of <sys/stdio.h>
    else:
        at_cwd, noreplace = -100, 1  # AT_FDCWD of <fcntl.h>, RENAME_NOREPLACE of <linux/fs.h>
        failed = libc.renameat2(at_cwd, old, at_cwd, new, noreplace)
    if not failed:
        return
    number = ctypes.get_errno()
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        raise AlreadyExistsError(f"{shown(target.name)} already exists")
    raise OSError(number, os.strerror(number), str(target))
