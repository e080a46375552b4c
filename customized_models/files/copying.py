"""Copies a file that is not trusted, and reads it once."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import MalformedError, shown
from .digests import FileDigest
from .model_directory import checked_size
from .reading import opened
from .streams import FileWriter, copy_range


def copy_untrusted(file: Path, directory: Path, name: str) -> FileDigest:
    """Copy a regular file as large as the table of a model directory allows; links are refused.

    Args:
        file: What to copy.
        directory: Where to.
        name: The file's path in a model directory, and in `directory`.

    Returns:
        The digest of what was copied, which is on the disk.

    Raises:
        MalformedError: It is missing, or changed while it was copied.
        UnsafeFileError: It is a link, a pipe or a device, or is too large.
        StorageError: The disk failed.
    """
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    with opened(file, os.O_NOFOLLOW) as fd, FileWriter(directory / name) as writer:
        before = os.fstat(fd)
        checked_size(name, before.st_size)
        copy_range(fd, 0, before.st_size, writer, shown(name))
        digest = writer.finish()
        after = os.fstat(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise MalformedError(f"{shown(name)} changed while it was copied")
    return digest
