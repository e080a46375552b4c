"""Objects under one URL, through fsspec: the few calls that a storage makes, each of them retried.

fsspec and its packages are imported when a store is used first. Their event loops and connections
belong to one process: after a fork, or out of a pickle, they are made anew.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import IntegrityError, MissingDependencyError, StorageError, shown
from .stores import AT_ONCE, STORES, store_of

T = TypeVar("T")


class NoObjectError(LookupError):
    """The store has no such object. It never leaves the storage, which knows what that means."""


WAITS = (0.1, 0.5, 2.0)
"""Seconds before a call is made again: a server is restarted in about two."""

PIECE = 16 << 20  # bytes asked for at once: less would spend its time waiting for answers

_INHERITED = list[Any]()
"""Filesystems of the process that this one was forked from. They are kept: closing one would take
sockets out of the parent's event loop, whose list of them the kernel shares."""


class Objects:
    """The objects whose names begin with a URL and a slash; names here are without these.

    Every method may raise `StorageError`, once all of a few attempts have failed.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """See `FsspecStorage`; nothing is connected to.

        Raises:
            InvalidOptionError: The URL is not one of a known store, with a bucket.
            MissingDependencyError: The store's package is not installed.
        """
        self._scheme, self._root = store_of(url)
        self._options = dict(options)
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    # Whole objects

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of a small object; an `IntegrityError` of its reads it again.

        Args:
            name: Of an object that is not empty.
            parse: Proves that the bytes are all of them, and the right ones.

        Raises:
            NoObjectError: There is none.
        """

        def read(filesystem: Any) -> T:
            # A range, because s3fs would ask for the size of a whole object first.
            return parse(filesystem.cat_file(self._path(name), start=0, end=PIECE))

        return self._tried(name, read, FileNotFoundError)

    def write(self, name: str, data: bytes) -> None:
        """Make or replace a small object; whoever reads it sees the old one or the new one."""
        self._tried(name, lambda fs: fs.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> None:
        """Make a small object, if there is none.

        Raises:
            FileExistsError: There is one: another's, or this one after an answer was lost.
        """
        self._put(name, data, {"mode": "create"}, FileExistsError)

    def version(self, name: str) -> Any:
        """The version of an object; None where the store has none to tell.

        Raises:
            NoObjectError: There is no object.
        """
        known = STORES[self._scheme].version
        if known is None:
            return None
        return self._tried(name, lambda fs: fs.info(self._path(name))[known], FileNotFoundError)

    def replace(self, name: str, data: bytes, version: Any) -> None:
        """Replace a small object, if it still is of that version; any one, if that is None.

        Raises:
            FileExistsError: It is of another version: after another's change, or after this one
                whose answer was lost.
            NoObjectError: There is none.
        """
        condition = {} if version is None else {"IfMatch": version}
        self._put(name, data, condition, FileExistsError, FileNotFoundError)

    def _put(
        self, name: str, data: bytes, condition: Mapping[str, Any], *answers: type[OSError]
    ) -> None:
        def put(filesystem: Any) -> None:
            try:
                filesystem.pipe_file(self._path(name), data, **condition)
            except OSError as error:
                if _is_conflict(error):
                    raise FileExistsError(name) from error
                raise

        self._tried(name, put, *answers)

    # Large ones

    def upload(self, file: Path, name: str) -> None:
        """Put a file of this host; see `Store.upload` for what an attempt leaves to the next."""
        put = STORES[self._scheme].upload
        self._tried(name, lambda fs: put(fs, file, self._path(name), AT_ONCE))

    def range(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, which the object must have.

        Raises:
            NoObjectError: There is no such object.
        """

        def read(filesystem: Any) -> bytes:
            data: bytes = filesystem.cat_file(self._path(name), start=start, end=end)
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came where {end - start} were asked for")
            return data

        return self._tried(name, read, FileNotFoundError)

    # Many

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix` and a slash, sorted."""

        def find(filesystem: Any) -> list[str]:
            try:
                found = filesystem.find(self._path(prefix))
            except FileNotFoundError:  # some have it that nothing is a directory that is missing
                return []
            names = (name.lstrip("/").removeprefix(f"{self._root}/") for name in found)
            return sorted(name for name in names if name.startswith(f"{prefix}/"))

        return self._tried(prefix, find)

    def remove(self, name: str) -> None:
        """Remove an object; no error if absent."""
        with suppress(NoObjectError):  # as asked, or by an attempt whose answer was lost
            self._tried(name, lambda fs: fs.rm_file(self._path(name)), FileNotFoundError)

    def remove_all(self, prefix: str) -> None:
        """Remove all objects whose names begin with `prefix` and a slash, and parts of such."""
        with ThreadPoolExecutor(AT_ONCE, "remove") as pool:
            list(pool.map(self.remove, self.names(prefix)))
        abort = STORES[self._scheme].abort
        if abort is not None:
            self._tried(prefix, lambda fs: abort(fs, self._path(prefix)))

    # How

    def url(self, name: str) -> str:
        """Of an object."""
        return f"{self._scheme}://{self._path(name)}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tried(self, name: str, call: Callable[[Any], T], *answers: type[OSError]) -> T:
        """What `call` returns at one of a few attempts; `answers` are no failures."""
        for wait in (*WAITS, None):
            try:
                return call(self._filesystem())
            except Exception as error:  # each package has errors of its own, some of no base class
                if isinstance(error, FileNotFoundError) and FileNotFoundError in answers:
                    raise NoObjectError(name) from error
                if isinstance(error, (*answers, StorageError, MissingDependencyError)):
                    raise
                if wait is None or isinstance(error, PermissionError):
                    if isinstance(error, IntegrityError):
                        raise
                    raise StorageError(f"{self.url(name)}: {shown(error)}") from error
            time.sleep(wait * random.uniform(0.5, 1.5))  # or all would come back at once
        raise AssertionError("the last attempt returns or raises")

    def _filesystem(self) -> Any:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            if opened is not None:
                _INHERITED.append(opened)
            opened = self._opened = (os.getpid(), self._open())
        return opened[1]

    def _open(self) -> Any:
        import fsspec

        store = STORES[self._scheme]
        filesystem = fsspec.filesystem(
            self._scheme,
            skip_instance_cache=True,
            use_listings_cache=False,
            **store.made_with(self._options),
        )
        for name, value in store.attributes.items():
            setattr(filesystem, name, value)
        return filesystem


def _is_conflict(error: BaseException) -> bool:
    """Whether S3 refused a condition; s3fs says so in words alone, its cause has the status."""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412)
