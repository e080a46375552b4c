"""A directory that a server reads models from, and that this host can write to.

Settings: `models_directory`, its path as this host sees it; `server_directory`, its path as the
server sees it, if that is another one.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from attrs import frozen

from ..errors import (
    IntegrityError,
    InvalidOptionError,
    ServedModelChangedError,
    shown,
)
from ..files.digests import SHA256, hash_file, new_hash
from ..files.writing import disk_errors, fsync
from ..models import DeploymentEnvironment, Progress

SETTINGS = ("models_directory", "server_directory")

_PIECE = 4 << 20  # bytes copied between two looks at whether to stop
_LOCK = ".lock"
_UNFINISHED = ".unfinished-"  # no server takes a name with a dot in front for a model


@frozen
class SharedDirectory:
    """Where this host puts models for a server.

    Attributes:
        here: As this host sees it.
        there: As the server sees it.
    """

    here: Path
    there: PurePosixPath

    @classmethod
    def of(cls, environment: DeploymentEnvironment) -> SharedDirectory:
        """The one that an environment's settings name.

        Raises:
            InvalidOptionError: They name none, or paths that are not absolute.
        """
        here = environment.settings.get("models_directory")
        if here is None:
            raise InvalidOptionError(
                f"environment {shown(environment.name)} needs the setting 'models_directory': a "
                f"directory that its server reads, as this host sees it"
            )
        there = environment.settings.get("server_directory", here)
        for path in (here, there):
            if not isinstance(path, str) or not path.startswith("/"):
                raise InvalidOptionError(f"{' and '.join(SETTINGS)} must be absolute paths")
        return cls(Path(here), PurePosixPath(there))

    def check(self) -> None:
        """Whether something can be put there.

        Raises:
            InvalidOptionError: It is no directory that this process may write to.
        """
        if not self.here.is_dir() or not os.access(self.here, os.W_OK | os.X_OK):
            raise InvalidOptionError(
                f"the setting 'models_directory' names no directory that can be written to: "
                f"{shown(self.here)}"
            )

    def seen_by_server(self, name: str) -> str:
        """The path of what lies there under `name`, for the server."""
        return str(self.there / name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who gives names a meaning at the server, while the block lasts.

        Of all who see the directory, on any host: the lock is one of its file system.

        Raises:
            StorageError: The file system has no locks.
        """
        import fcntl  # Windows, where the package can be imported, has none

        with ExitStack() as stack:
            with disk_errors(f"{shown(self.here)} cannot be locked"):
                lock = stack.enter_context((self.here / _LOCK).open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
            yield

    @contextmanager
    def unfinished(self) -> Iterator[Path]:
        """A path in the directory, for what is not whole yet; what is left there is removed."""
        path = self.here / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            remove(path)

    def publish(self, unfinished: Path, name: str) -> None:
        """Give a finished file or directory its name, which was drawn for it alone.

        Raises:
            StorageError: The file system failed.
        """
        with disk_errors(f"{shown(name)} cannot be put into {shown(self.here)}"):
            for path in (*unfinished.rglob("*"), unfinished):
                path.chmod(0o755 if path.is_dir() else 0o644)  # the server is another user's
                fsync(path)
            unfinished.rename(self.here / name)
            fsync(self.here)

    def put_directory(self, name: str, files: Mapping[str, Path], progress: Progress) -> None:
        """A directory with copies of these files, by name; all or nothing.

        Raises:
            StorageError: The file system failed.
        """
        total, done = sum(path.stat().st_size for path in files.values()), 0
        with self.unfinished() as directory:
            with disk_errors(f"{shown(name)} cannot be put into {shown(self.here)}"):
                directory.mkdir()
                for file, source in files.items():
                    for count in _copied(source, directory / file):
                        done += count
                        progress("copying", done, total)
            self.publish(directory, name)

    def put_file(self, name: str, source: Path, digest: str, progress: Progress) -> None:
        """A copy of a file; all or nothing.

        Args:
            name: Of the copy.
            source: The file.
            digest: `sha256:` of its bytes.
            progress: Called after each piece.

        Raises:
            StorageError: The file system failed.
            IntegrityError: The file has other bytes by now.
        """
        total, done, hash = source.stat().st_size, 0, new_hash(SHA256)
        with self.unfinished() as path:
            with disk_errors(f"{shown(name)} cannot be put into {shown(self.here)}"):
                for count in _copied(source, path, hash.update):
                    done += count
                    progress("copying", done, max(done, total))
            if f"{SHA256}:{hash.hexdigest()}" != digest:
                raise IntegrityError(f"{shown(source.name)} changed while it was copied")
            self.publish(path, name)

    def holds(self, name: str, digest: str) -> bool:
        """Whether a file of those bytes is there under a name.

        Raises:
            ServedModelChangedError: One of other bytes is.
        """
        path = self.here / name
        if not path.exists():
            return False
        if hash_file(path, SHA256).digest != digest:
            raise ServedModelChangedError(f"{shown(path)} holds other bytes than were put there")
        return True

    def remove(self, name: str, digest: str, *, file: str = "") -> None:
        """Remove what was put there under `name`; no error if absent.

        Args:
            name: Drawn for one deployment.
            digest: `sha256:` of the file; "" if it was not finished, and nothing else can be there.
            file: The file's name, if `name` is a directory.

        Raises:
            ServedModelChangedError: It has other bytes than were put there, and is left alone.
            StorageError: The file system failed.
        """
        path = self.here / name
        if digest and (path / file).is_file() and hash_file(path / file, SHA256).digest != digest:
            raise ServedModelChangedError(
                f"{shown(path)} holds other bytes than were put there, and is left alone"
            )
        with (
            disk_errors(f"{shown(name)} cannot be removed"),
            suppress(FileNotFoundError),
            self.unfinished() as gone,  # first out of the server's sight, all at once
        ):
            path.rename(gone)


def version_name(served_name: str, mark: str) -> str:
    """What a version of a model is called in a directory and at the server, before it is proven."""
    return f"{re.sub('[/:]', '-', served_name)[:100]}.cm-{mark}"


def remove(path: Path) -> None:
    """Remove a file or directory of ours, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _copied(source: Path, target: Path, take: Callable[[bytes], object] = len) -> Iterator[int]:
    """Copy a file; the number of bytes of each piece, which `take` is given."""
    with source.open("rb") as opened, target.open("xb") as written:
        while piece := opened.read(_PIECE):
            written.write(piece)
            take(piece)
            yield len(piece)
