"""Where a registry keeps its bytes: immutable directories under keys, published all or nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from ..errors import AlreadyExistsError, InvalidNameError, NotFoundError, shown

_KEY = re.compile(r"[a-z]+/[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
_STAGING_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
STAGING_GRACE = 7 * 24 * 3600  # seconds an abandoned staging directory is kept


class Storage(Protocol):
    """Immutable directories under keys such as `customized/<name>`.

    To add one, write these six methods and run `customized_models.testing.StorageContract`
    against them. Jobs run in processes of their own, so a storage must pickle to one that sees
    the same keys.
    """

    def staging(self, name: str) -> AbstractContextManager[Path]:
        """A private directory to write into, on the side that `publish` can take it from.

        Removed at the end unless published. After a kill the same name finds what it held.
        """

    def publish(self, directory: Path, key: str) -> None:
        """Make a staged directory visible under `key`, durably, all of it or nothing.

        Raises:
            AlreadyExistsError: the key is taken, even by a concurrent publisher.
        """

    def checkout(self, key: str) -> AbstractContextManager[Path]:
        """The directory as local read-only files while the block lasts.

        Raises:
            NotFoundError: nothing is stored under the key.
        """

    def open(self, key: str, file: str) -> BinaryIO:
        """One file of a stored directory, seekable.

        Raises:
            NotFoundError: no such key or file.
        """

    def delete(self, key: str) -> None:
        """Remove the key; no error if absent. A kill in between leaves it whole or gone."""

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys that start with `prefix`, sorted."""


class LocalStorage:
    """Keeps each key as the directory `root/<key>`, owned by this library alone."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """See `Storage.staging`. Directories abandoned for a week are swept on the way."""
        if not _STAGING_NAME.fullmatch(name):
            raise InvalidNameError(f"not a staging name: {shown(name)}")
        parent = self.root / ".staging"
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep(parent)
        directory = parent / name
        directory.mkdir(exist_ok=True, mode=0o700)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def publish(self, directory: Path, key: str) -> None:
        """See `Storage.publish`: fsync of files and directory, rename, fsync of the parent."""
        target = self._path(key)
        make_directories(target.parent)
        for path in sorted(directory.rglob("*"), reverse=True):
            path.chmod(0o755 if path.is_dir() else 0o644)
            fsync(path)
        directory.chmod(0o755)
        fsync(directory)
        rename_without_replacing(directory, target)
        fsync(target.parent)
        fsync(directory.parent)

    @contextmanager
    def checkout(self, key: str) -> Iterator[Path]:
        """See `Storage.checkout`: the stored directory itself."""
        yield self.local_path(key)

    def local_path(self, key: str) -> Path:
        """The stored directory.

        Raises:
            NotFoundError: nothing is stored under the key.
        """
        path = self._path(key)
        if not path.is_dir():
            raise NotFoundError(f"nothing is stored under {shown(key)}")
        return path

    def open(self, key: str, file: str) -> BinaryIO:
        """See `Storage.open`."""
        path = self.local_path(key) / file
        if Path(file).name != file or not path.is_file():
            raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
        return cast(BinaryIO, path.open("rb"))

    def delete(self, key: str) -> None:
        """See `Storage.delete`: renamed into the trash, then removed."""
        path = self._path(key)
        trash = self.root / ".trash"
        trash.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            path.rename(trash / uuid.uuid4().hex)
        except FileNotFoundError:
            return
        fsync(path.parent)
        for gone in trash.iterdir():  # also what an earlier, killed delete left
            shutil.rmtree(gone, ignore_errors=True)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        kinds = sorted(self.root.glob("[a-z]*/")) if self.root.is_dir() else []
        keys = [f"{kind.name}/{path.name}" for kind in kinds for path in kind.iterdir()]
        return iter(sorted(key for key in keys if key.startswith(prefix) and _KEY.fullmatch(key)))

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvalidNameError(f"not a key: {shown(key)}")
        return self.root / key

    def _sweep(self, parent: Path) -> None:
        for directory in parent.iterdir():
            try:
                abandoned = directory.stat().st_mtime < time.time() - STAGING_GRACE
            except FileNotFoundError:
                continue  # its owner finished meanwhile
            if abandoned:
                shutil.rmtree(directory, ignore_errors=True)


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
        AlreadyExistsError: something is there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    if sys.platform == "darwin":
        failed = libc.renamex_np(old, new, 0x4)  # RENAME_EXCL
    else:
        at_cwd, noreplace = -100, 1
        failed = libc.renameat2(at_cwd, old, at_cwd, new, noreplace)
    if not failed:
        return
    number = ctypes.get_errno()
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        raise AlreadyExistsError(f"{shown(target.name)} already exists")
    raise OSError(number, os.strerror(number), str(target))
