"""`LocalStorage`: keys as plain directories of this host."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from .. import arguments
from ..errors import InvalidNameError, NotFoundError, shown
from ..files.writing import (
    disk_errors,
    fsync,
    make_directories,
    rename_without_replacing,
    write_file,
)
from .protocol import checked_key, is_key

_STAGING_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
STAGING_GRACE = 7 * 24 * 3600  # seconds: a save that died on Friday is taken up on Monday


class LocalStorage:
    """Keeps each key as the directory `root/<key>`, owned by this library alone."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = arguments.path("root", root).absolute()

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """See `Storage.staging`. Directories abandoned for a week are swept on the way."""
        if not _STAGING_NAME.fullmatch(name):
            raise InvalidNameError(f"not a staging name: {shown(name)}")
        parent = self.root / ".staging"
        directory = parent / name
        with disk_errors(f"no directory to write {shown(name)} in"):
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sweep(parent)
            directory.mkdir(exist_ok=True, mode=0o700)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def publish(self, directory: Path, key: str) -> None:
        """See `Storage.publish`: fsync of files and directory, rename, fsync of the parent."""
        target = self._path(key)
        with disk_errors(f"{shown(key)} cannot be published"):
            make_directories(target.parent)
            for path in sorted(directory.rglob("*"), reverse=True):
                path.chmod(0o755 if path.is_dir() else 0o644)
                fsync(path)
            directory.chmod(0o755)
            fsync(directory)
            rename_without_replacing(directory, target)
        with disk_errors(f"{shown(key)} may not outlive a power cut", outcome_unknown=True):
            fsync(target.parent)
            fsync(directory.parent)

    @contextmanager
    def checkout(self, key: str) -> Iterator[Path]:
        """See `Storage.checkout`: the stored directory itself."""
        yield self.local_path(key)

    def local_path(self, key: str) -> Path:
        """The stored directory.

        Raises:
            NotFoundError: Nothing is stored under the key.
        """
        path = self._path(key)
        if not path.is_dir():
            raise NotFoundError(f"nothing is stored under {shown(key)}")
        return path

    def open(self, key: str, file: str) -> BinaryIO:
        """See `Storage.open`."""
        path = self.local_path(key) / file
        inside = not Path(file).is_absolute() and ".." not in Path(file).parts
        if not inside or not path.is_file():
            raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
        with disk_errors(f"{shown(file)} of {shown(key)} cannot be read"):
            return cast(BinaryIO, path.open("rb"))

    def rewrite(self, key: str, file: str, data: bytes) -> None:
        """See `Storage.rewrite`: written beside, fsync, rename, fsync of the directory."""
        self.open(key, file).close()
        target = self.local_path(key) / file
        with (
            self.staging(f"rewrite-{uuid.uuid4().hex}") as directory,
            disk_errors(f"{shown(file)} of {shown(key)} cannot be replaced"),
        ):
            write_file(directory / "new", data)
            (directory / "new").chmod(0o644)
            os.replace(directory / "new", target)
            with disk_errors(
                f"{shown(file)} of {shown(key)} may not outlive a power cut", outcome_unknown=True
            ):
                fsync(target.parent)

    def delete(self, key: str) -> None:
        """See `Storage.delete`: renamed into the trash, then removed."""
        path = self._path(key)
        trash = self.root / ".trash"
        with disk_errors(f"{shown(key)} cannot be deleted"):
            trash.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                path.rename(trash / uuid.uuid4().hex)
            except FileNotFoundError:
                return
        with disk_errors(f"{shown(key)} may be back after a power cut", outcome_unknown=True):
            fsync(path.parent)
            for gone in trash.iterdir():  # also what an earlier, killed delete left
                shutil.rmtree(gone, ignore_errors=True)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        with disk_errors("the stored models cannot be listed"):
            kinds = sorted(self.root.glob("[a-z]*/")) if self.root.is_dir() else []
            every = [f"{kind.name}/{path.name}" for kind in kinds for path in kind.iterdir()]
        return iter(sorted(key for key in every if key.startswith(prefix) and is_key(key)))

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def _sweep(self, parent: Path) -> None:
        for directory in parent.iterdir():
            try:
                abandoned = directory.stat().st_mtime < time.time() - STAGING_GRACE
            except FileNotFoundError:
                continue  # its owner finished meanwhile
            if abandoned:
                shutil.rmtree(directory, ignore_errors=True)
