"""Directories fetched from elsewhere, kept for the next reader: bounded, shared by processes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from ..files.digests import hash_file
from ..files.locks import hold, lock
from ..files.writing import disk_errors

_HASHED = 8 << 20  # bytes: what is hashed at each use, in some milliseconds


@frozen
class Fetched:
    """A file that a directory has.

    Attributes:
        size: In bytes.
        digest: Of its bytes, by BLAKE3.
        original: Whether the file never was another one; else it is hashed at each use.
    """

    size: int
    digest: str
    original: bool


class ReadCache:
    """Directories under names, each of which always has the same large files.

    A directory that is in use is locked, by a lock that ends with its process. Of the others those
    used last are kept, as many as fit in `limit` bytes with those in use.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit

    @contextmanager
    def holding(
        self, name: str, files: Mapping[str, Fetched], fetch: Callable[[str, Path], None]
    ) -> Iterator[Path]:
        """The directory of that name with these files, which stays while the block lasts.

        Args:
            name: Of the directory.
            files: By their paths.
            fetch: Writes the file of a path to a new file, and proves its digest.

        Raises:
            StorageError: The disk failed, or is full.
        """
        with self._held(name) as entry:
            with disk_errors("a model cannot be kept on this host while it is read"):
                self._make_room(sum(file.size for file in files.values()) - _bytes_in(entry))
                _fill(entry, files, fetch)
            yield entry / "files"
        self._make_room(0)

    @contextmanager
    def _held(self, name: str) -> Iterator[Path]:
        entry = self._directory / name
        while True:
            with disk_errors(f"no directory to keep models in: {self._directory}"):
                entry.mkdir(parents=True, exist_ok=True, mode=0o700)
            with hold(entry) as held:
                if held:  # else it was removed meanwhile
                    os.utime(entry)
                    yield entry
                    return

    def _make_room(self, needed: int) -> None:
        """Remove what was used longest ago and nobody holds, until `needed` more bytes fit."""
        with lock(self._directory, wait=True):
            for gone in self._directory.glob(".gone-*"):
                shutil.rmtree(gone, ignore_errors=True)
            entries = [path for path in self._directory.iterdir() if path.name[0] != "."]
            total = needed + sum(_bytes_in(entry) for entry in entries)
            for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
                if total <= self._limit:
                    return
                with lock(entry, wait=False) as alone:
                    if alone:
                        total -= _bytes_in(entry)
                        gone = self._directory / f".gone-{uuid.uuid4().hex}"
                        entry.rename(gone)
                        shutil.rmtree(gone, ignore_errors=True)


def _fill(entry: Path, files: Mapping[str, Fetched], fetch: Callable[[str, Path], None]) -> None:
    """Fetch what is missing, one process at a time: each file beside, then renamed."""
    incoming = entry / "incoming"
    incoming.mkdir(exist_ok=True)
    (entry / "files").mkdir(exist_ok=True)
    with lock(incoming, wait=True):
        for path, file in files.items():
            target = entry / "files" / path
            if not _is_there(target, file):
                (incoming / "file").unlink(missing_ok=True)  # of a process that was killed
                fetch(path, incoming / "file")
                (incoming / "file").chmod(0o444)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(incoming / "file", target)


def _is_there(path: Path, file: Fetched) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.original and file.size > _HASHED:
        return True  # its digest was proven before it got its name
    return hash_file(path).digest == file.digest


def _bytes_in(directory: Path) -> int:
    """Bytes of all files; what others remove meanwhile does not count."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
